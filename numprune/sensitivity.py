"""How much a model's loss rises when one projection alone is cut: the currency in which layers are compared.

The rise is the Kullback-Leibler divergence from the model's next-token distribution to that of the model with the cut,
in nats per token: the rise of the negative log-likelihood on text that the model itself would write. Unlike the rise on
given text it is never negative, and far less noisy for the same tokens.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from numprune.architectures import after_blocks, decoder_blocks, logits
from numprune.capture import enter


class LossProbe:
    """Goes through a model's blocks in order; at each block it measures what other weights there would do to the loss.

    What enters a block is computed once, what follows it once for every measurement.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, input_ids: Tensor, *, batch_size: int) -> None:
        """Starts before the first block.

        Args:
            model: On the device to compute on, as a whole.
            input_ids: (samples, length) calibration tokens.
            batch_size: Samples that go through a block together.
        """
        self._model = model
        self._blocks = decoder_blocks(model)
        self._after = after_blocks(model)
        self._tokens = input_ids.numel()
        self._index = 0
        self._hidden, self._arguments = enter(model, input_ids.split(batch_size), model.device)
        self._final = [self._run_on(states) for states in self._hidden]

    @torch.no_grad()
    def rise(self, layer: nn.Linear, weight: Tensor) -> float:
        """The rise of the loss, in nats per token, if a layer of the present block had another weight.

        Args:
            layer: A linear layer of the block that the probe stands before.
            weight: (D_out, D) to try; the layer keeps its own.
        """
        own = layer.weight.data
        layer.weight.data = weight.to(own)
        try:
            changed = (self._run_on(states) for states in self._hidden)
            total = sum(self._divergence(*pair) for pair in zip(self._final, changed, strict=True))
        finally:
            layer.weight.data = own
        return total / self._tokens

    @torch.no_grad()
    def advance(self) -> None:
        """Passes on to the next block."""
        self._hidden = [self._block(self._index, states) for states in self._hidden]
        self._index += 1

    def _run_on(self, states: Tensor) -> Tensor:
        for index in range(self._index, len(self._blocks)):
            states = self._block(index, states)
        for module in self._after:
            states = module(states)
        return states

    def _block(self, index: int, states: Tensor) -> Tensor:
        following: Tensor = self._blocks[index](states, **self._arguments[len(states)][index])
        return following

    def _divergence(self, own: Tensor, changed: Tensor) -> float:
        total = 0.0
        # One sample at a time: with a large vocabulary the logits of a batch outweigh everything else.
        for expected, found in zip(own.split(1), changed.split(1), strict=True):
            p, q = (logits(self._model, states).float().log_softmax(-1) for states in (expected, found))
            total += kl_div(q, p, reduction="sum", log_target=True).item()
        return total


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
