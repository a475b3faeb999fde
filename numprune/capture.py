"""The calibration pass: block by block, the second moments of what enters the output projections.

The hidden states of all samples are carried from block to block; activations inside a block live for one batch, and
the moments of one block at a time are handed out. A block visits the compute device only while it runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.architectures import decoder_blocks, linear, prunable_groups
from numprune.errors import NumpruneError
from numprune.statistics import BlockStatistics, Moments


@torch.no_grad()
def capture(
    model: PreTrainedModel, input_ids: Tensor, *, batch_size: int = 8, device: torch.device | str | None = None
) -> Iterator[BlockStatistics]:
    """Runs calibration tokens through a model and yields each block's statistics as soon as it is through.

    Args:
        model: A supported decoder-only model.
        input_ids: (samples, length) token ids.
        batch_size: Samples that go through a block together.
        device: Where blocks compute; by default where the model is.

    Yields:
        Statistics of blocks 0, 1, 2, ...

    Raises:
        NumpruneError: If the architecture is not supported, or activations become NaN or infinite.
    """
    model.eval()
    blocks = decoder_blocks(model)
    groups = prunable_groups(model)
    home = model.device
    device = torch.device(device or home)
    hidden, arguments = enter(model, input_ids.split(batch_size), device)
    for index, block in enumerate(blocks):
        block.to(device)
        moments = {group.name: _Accumulator(linear(block, group.consumer)) for group in groups[index]}
        with _observing(moments.values()):
            for batch, states in enumerate(hidden):
                hidden[batch] = block(states, **arguments[len(states)][index])
        block.to(home)
        if not all(torch.isfinite(states).all() for states in hidden):
            raise NumpruneError(f"Activations are NaN or infinite after decoder block {index}: check the weights.")
        yield BlockStatistics(index, {name: accumulator.moments() for name, accumulator in moments.items()})


def enter(
    model: PreTrainedModel, batches: tuple[Tensor, ...], device: torch.device
) -> tuple[list[Tensor], dict[int, list[dict[str, Any]]]]:
    """What enters the first block for each batch, and for each batch size the keyword arguments of every block.

    The model's own forward pass prepares embeddings, masks and rotary angles; its blocks are stood in for by recorders
    that let hidden states through unchanged.
    """
    decoder = model.get_decoder()
    recorders = [_Recorder() for _ in decoder.layers]
    first = recorders[0]
    blocks, decoder.layers = decoder.layers, nn.ModuleList(recorders)
    hidden: list[Tensor] = []
    arguments: dict[int, list[dict[str, Any]]] = {}
    try:
        for batch in batches:
            decoder(input_ids=batch.to(model.device), use_cache=False)
            hidden.append(first.hidden.to(device))
            if len(batch) not in arguments:
                arguments[len(batch)] = [_on(device, recorder.arguments) for recorder in recorders]
    finally:
        decoder.layers = blocks
    return hidden, arguments


class _Recorder(nn.Module):
    hidden: Tensor
    arguments: dict[str, Any]

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.hidden = hidden_states
        self.arguments = arguments
        return hidden_states


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_on(device, item) for item in value)
    if isinstance(value, dict):
        return {key: _on(device, item) for key, item in value.items()}
    return value


class _Accumulator:
    """Streams X^T X and the sum of X over batches: products in float32 (float64 if X is), sums in float64."""

    def __init__(self, consumer: nn.Linear) -> None:
        size, device = consumer.in_features, consumer.weight.device
        self.consumer = consumer
        self.precision = torch.promote_types(consumer.weight.dtype, torch.float32)
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.count = 0

    def observe(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2).to(self.precision)
        self.gram += rows.T @ rows
        self.sum += rows.sum(0, dtype=torch.float64)
        self.count += len(rows)

    def moments(self) -> Moments:
        return Moments(self.gram.to(self.precision), (self.sum / self.count).to(self.precision), self.count)


@contextmanager
def _observing(accumulators: Any) -> Iterator[None]:
    hooks = [accumulator.consumer.register_forward_pre_hook(accumulator.observe) for accumulator in accumulators]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
