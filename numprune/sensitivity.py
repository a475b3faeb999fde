"""How much a model's loss rises when one projection alone is cut: the currency in which layers are compared.

The rise is the Kullback-Leibler divergence from the model's next-token distribution to that of the model with the cut,
in nats per token: the rise of the negative log-likelihood on text that the model itself would write. Unlike the rise on
given text it is never negative, and far less noisy for the same tokens.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.architectures import decoder_blocks, decoder_output, logits
from numprune.capture import enter
from numprune.memory import HiddenStates
from numprune.ranks import add_up, rank, ranks
from numprune.samples import Samples
from numprune.streaming import outside_to, visit


class LossProbe:
    """Measures what other weights would do to the loss, many of them in one pass through the blocks behind.

    A trial is the model with one weight changed: its hidden states branch off the model's own in the block of that
    weight and go on beside them. So a block is on the device once for all trials that branched off before it, and for
    what the model itself says, which the first trials take along. Ranks share the trials, not the samples: these may
    be fewer.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        samples: Samples | Tensor,
        *,
        batch_size: int | None,
        device: torch.device,
        first: int = 0,
        folder: Path | None = None,
    ) -> None:
        """Carries the model's own hidden states to where trials begin.

        Args:
            model: The model.
            samples: To measure on, or their (samples, length) token ids.
            batch_size: Samples that go through a block together; None: `fitting_batch`.
            device: Where blocks compute.
            first: Index of the block that trials begin with.
            folder: For hidden states, if memory is short.
        """
        self._model = model
        outside_to(model, device)
        samples = Samples.of(samples)
        self._scored = samples.scored(len(model.get_output_embeddings().weight))
        self._own, self._arguments = enter(model, samples, batch_size, device, folder)
        for index, block in visit(decoder_blocks(model)[:first], device):
            self._carry(self._own, index, block)
        self._final, self._is_final = self._own.copy(), False
        self._trials: dict[Any, HiddenStates | None] = {}

    @torch.no_grad()
    def branch(self, name: Any, index: int, block: nn.Module, layer: nn.Linear, weight: Tensor) -> None:
        """Begins a trial: the model's own hidden states go through the block with another weight.

        Args:
            name: Of the trial.
            index: Of the block, the one that the model's own hidden states are before.
            block: It.
            layer: A linear layer of the block.
            weight: (D_out, D) to try; the layer keeps its own.
        """
        self._trials[name] = None
        if len(self._trials) % ranks() != rank():
            return
        own = layer.weight.data
        layer.weight.data = weight.to(own)
        try:
            self._trials[name] = self._own.mapped(self._arguments.through(index, block, self._own))
        finally:
            layer.weight.data = own

    @torch.no_grad()
    def follow(self, index: int, block: nn.Module) -> None:
        """Carries all trials that branched off before a block through it."""
        for trial in self._trials.values():
            if trial:
                self._carry(trial, index, block)
        if not self._is_final:
            self._carry(self._final, index, block)

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module) -> None:
        """Carries the model's own hidden states through a block, after which trials of the next one can begin."""
        self._carry(self._own, index, block)

    @torch.no_grad()
    def rises(self) -> dict[Any, float]:
        """Ends all trials, which are through the last block: the rise of the loss in nats per token, by their names."""
        names, trials = list(self._trials), [trial and trial.split(1) for trial in self._trials.values()]
        self._trials, self._is_final = {}, True
        totals = torch.zeros(len(trials), dtype=torch.float64, device=self._final.device)
        # One sample at a time: with a large vocabulary the logits of a batch outweigh everything else.
        for sample, own in enumerate(self._final.split(1)):
            scored = self._scored[sample].nonzero().flatten().to(own.device)
            expected = self._log_probabilities(own[:, scored])
            probabilities = expected.exp()
            for number, trial in enumerate(trials):
                if trial:
                    found = self._log_probabilities(trial[sample][:, scored])
                    totals[number] += (probabilities * (expected - found)).sum()
        add_up(totals)
        return dict(zip(names, (totals / self._scored.sum()).tolist(), strict=True))

    def _carry(self, hidden: HiddenStates, index: int, block: nn.Module) -> None:
        for batch, after in enumerate(self._arguments.through(index, block, hidden)):
            hidden[batch] = after

    def _log_probabilities(self, states: Tensor) -> Tensor:
        return logits(self._model, decoder_output(self._model, states)).float().log_softmax(-1)


def rise_curve(losses: Tensor, measured: Mapping[int, float]) -> Tensor:
    """A loss curve of a projection in the currency of the model's loss.

    The rise grows nearly in proportion to the projection's squared error; the factor between them is interpolated
    between the counts at which it was measured, and constant outside of them.

    Args:
        losses: (units + 1,) share of the squared output lost after the first k units are gone.
        measured: Rise of the model's loss by count of removed units, at least one, each above 0.

    Returns:
        (units + 1,) float64 that begins with 0 and never falls.
    """
    counts = sorted(measured)
    smallest = torch.finfo(losses.dtype).tiny
    factors = [max(measured[count], 0.0) / max(losses[count].item(), smallest) for count in counts]
    removed = torch.arange(len(losses), dtype=torch.float64)
    factor = torch.full_like(removed, factors[0])
    for (a, b), (low, high) in zip(pairwise(counts), pairwise(factors), strict=True):
        share = ((removed - a) / (b - a)).clamp(0, 1)
        factor = torch.where(removed > a, low + share * (high - low), factor)
    return (losses * factor).cummax(0).values
