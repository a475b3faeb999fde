"""Perplexity in non-overlapping windows, the protocol of the pruning literature.

A window of L tokens is scored on its last L - 1 tokens, each given those before it in the same window. No token is
added in front. The perplexity is exp of the mean negative log-likelihood of all scored tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from numprune.architectures import logits
from numprune.errors import NumpruneError


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what produced it.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per scored token.
        bits_per_byte: The same in bits per UTF-8 byte of the windows' text; None if the text is unknown. It compares
            models whose tokenizers differ.
        windows: How many windows were scored.
        length: Tokens a window; one less of them is scored.
    """

    perplexity: float
    bits_per_byte: float | None
    windows: int
    length: int


@torch.no_grad()
def window_losses(
    model: PreTrainedModel, windows: Tensor, *, batch_size: int = 8, device: torch.device | str | None = None
) -> Iterator[Tensor]:
    """Yields, batch by batch, each window's summed negative log-likelihood in nats, (batch,) float64.

    Args:
        model: A causal language model.
        windows: (windows, length) token ids.
        batch_size: Windows that go through the model together.
        device: Where to compute; the model is moved there.
    """
    model.eval()
    if device is not None:
        nn.Module.to(model, device)
    decoder: Any = model.get_decoder()
    for batch in windows.split(batch_size):
        input_ids = batch.to(model.device)
        hidden = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        # One window at a time: with a large vocabulary the logits of a batch outweigh everything else.
        windows_of_batch = zip(hidden[:, :-1].split(1), input_ids[:, 1:], strict=True)
        losses = [_loss(logits(model, states)[0], targets) for states, targets in windows_of_batch]
        yield torch.stack(losses).cpu()


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float(), targets, reduction="none").double().sum()


def perplexity(losses: Tensor, length: int, text_bytes: int | None = None) -> Perplexity:
    """Sums up the losses of all windows.

    Args:
        losses: (windows,) summed negative log-likelihoods in nats.
        length: Tokens a window.
        text_bytes: UTF-8 bytes of the windows' text.

    Raises:
        NumpruneError: If a loss is NaN or infinite.
    """
    if not torch.isfinite(losses).all():
        raise NumpruneError("The model's loss is NaN or infinite: check its weights and the data type.")
    scored = len(losses) * (length - 1)
    mean = losses.sum().item() / scored
    # The first token of a window is not scored; its bytes are left out in proportion.
    scored_bytes = text_bytes * (length - 1) / length if text_bytes else None
    return Perplexity(
        perplexity=math.exp(mean),
        bits_per_byte=mean * scored / math.log(2) / scored_bytes if scored_bytes else None,
        windows=len(losses),
        length=length,
    )
