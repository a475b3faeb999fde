"""Perplexity in non-overlapping windows, the protocol of the pruning literature.

A window of L tokens is scored on its last L - 1 tokens, each given those before it in the same window. No token is
added in front. Padding, and tokens that the output layer does not know because they stand for a condition, are not
scored. The perplexity is exp of the mean negative log-likelihood of all scored tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from numprune.architectures import decoder_blocks, decoder_output, logits
from numprune.batches import fitting_batch
from numprune.capture import enter
from numprune.errors import NumpruneError
from numprune.samples import Samples
from numprune.streaming import is_streamed, outside_to, visit

# What torch calls an ignored index.
_NOT_SCORED = -100


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what produced it.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per scored token.
        bits_per_byte: The same in bits per UTF-8 byte of the windows' text; None if the text is unknown. It compares
            models whose tokenizers differ.
        windows: How many windows were scored.
        length: Tokens a window; at most one less of them is scored.
    """

    perplexity: float
    bits_per_byte: float | None
    windows: int
    length: int


@torch.no_grad()
def window_losses(
    model: PreTrainedModel,
    windows: Samples | Tensor,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Tensor]:
    """Yields, batch by batch, each window's summed negative log-likelihood in nats, (batch,) float64.

    Args:
        model: A causal language model.
        windows: Samples, or (windows, length) token ids.
        batch_size: Windows that go through the model together, by default `fitting_batch`.
        device: Where to compute; by default where the model is.
    """
    model.eval()
    windows, vocabulary = Samples.of(windows), _vocabulary(model)
    blocks = decoder_blocks(model)
    place = torch.device(device or model.device)
    outside_to(model, place)
    batch_size = batch_size or fitting_batch(model, windows.length, place)
    # A model that is read block by block takes all windows through each block; one in memory, a batch through all.
    for together in windows.split(len(windows) if is_streamed(blocks) else batch_size):
        hidden, arguments = enter(model, together, batch_size, place)
        for index, block in visit(blocks, place):
            for batch, after in enumerate(arguments.through(index, block, hidden)):
                hidden[batch] = after
        for of_batch, states in zip(together.split(batch_size), hidden, strict=True):
            output = decoder_output(model, states)
            unscored = ~of_batch.scored(vocabulary)[:, :-1]
            targets = of_batch.input_ids[:, 1:].masked_fill(unscored, _NOT_SCORED).to(place)
            # One window at a time: with a large vocabulary the logits of a batch outweigh everything else.
            windows_of_batch = zip(output[:, :-1].split(1), targets, strict=True)
            losses = [_loss(logits(model, window)[0], wanted) for window, wanted in windows_of_batch]
            yield torch.stack(losses).cpu()


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float(), targets, ignore_index=_NOT_SCORED, reduction="none").double().sum()


def scored_tokens(model: PreTrainedModel, windows: Samples | Tensor) -> int:
    """How many tokens of some windows a model's loss is the loss of."""
    return int(Samples.of(windows).scored(_vocabulary(model))[:, :-1].sum())


def _vocabulary(model: PreTrainedModel) -> int:
    output: Any = model.get_output_embeddings()
    return len(output.weight)


def perplexity(losses: Tensor, length: int, text_bytes: int | None = None, *, scored: int | None = None) -> Perplexity:
    """Sums up the losses of all windows.

    Args:
        losses: (windows,) summed negative log-likelihoods in nats.
        length: Tokens a window.
        text_bytes: UTF-8 bytes of the windows' text.
        scored: Tokens that were scored; by default all but the first one of each window.

    Raises:
        NumpruneError: If a loss is NaN or infinite.
    """
    if not torch.isfinite(losses).all():
        raise NumpruneError("The model's loss is NaN or infinite: check its weights and the data type.")
    scored = len(losses) * (length - 1) if scored is None else scored
    mean = losses.sum().item() / scored
    # The first token of a window is not scored; its bytes are left out in proportion.
    scored_bytes = text_bytes * (length - 1) / length if text_bytes else None
    return Perplexity(
        perplexity=math.exp(mean),
        bits_per_byte=mean * scored / math.log(2) / scored_bytes if scored_bytes else None,
        windows=len(losses),
        length=length,
    )
