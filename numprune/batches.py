"""How many sequences go through a block together, where nobody says."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from numprune.architectures import decoder_blocks
from numprune.memory import total_memory

# Products of fewer rows are slower, and moments are added up more often; more rows are no faster (docs/figures.md).
_TOKENS = 8192
# Of a device's memory that the activations of a batch inside a block may take.
_SHARE = 1 / 8


def fitting_batch(model: PreTrainedModel, length: int, device: torch.device) -> int:
    """How many sequences of a length go through a block together.

    As many as have 8192 tokens, and whose activations take an eighth of the device's memory at most; at least one. It
    is the same however much of the memory is free: in other batches sums round differently.

    Args:
        model: Its blocks may be stored.
        length: Tokens a sequence.
        device: Where blocks compute.
    """
    room = int(_SHARE * total_memory(device) / activation_bytes(model))
    return max(1, min(_TOKENS, room) // length)


def activation_bytes(model: PreTrainedModel) -> int:
    """Bytes for each token of a batch while a block computes: three of its widest tensors, six hidden states."""
    widths = [layer.in_features for layer in decoder_blocks(model).modules() if isinstance(layer, nn.Linear)]
    embeddings: Any = model.get_input_embeddings()
    hidden = embeddings.weight.shape[1]
    return model.dtype.itemsize * (3 * max(widths, default=hidden) + 6 * hidden)
