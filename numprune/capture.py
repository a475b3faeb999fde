"""The calibration pass: block by block, the second moments of what enters the output projections.

The hidden states of all samples are carried from block to block; activations inside a block live for one batch, and
the moments of one block at a time are handed out. A block visits the compute device only while it runs.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.architectures import decoder_blocks, linear, prunable_groups
from numprune.errors import NumpruneError
from numprune.memory import HiddenStates
from numprune.ranks import add_up, own_share
from numprune.resume import Saved
from numprune.statistics import BlockStatistics, Moments, product
from numprune.streaming import visit

_LOGGER = logging.getLogger(__name__)


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    work: Path | None = None,
) -> Iterator[BlockStatistics]:
    """Runs calibration tokens through a model and yields each block's statistics as soon as it is through.

    Args:
        model: A supported decoder-only model.
        input_ids: (samples, length) token ids.
        batch_size: Samples that go through a block together; halved where memory does not suffice.
        device: Where blocks compute; by default where the model is.
        work: Folder that remembers how far this came. Where it already holds something, blocks that were handed out
            before are passed over.

    Yields:
        Statistics of blocks 0, 1, 2, ...

    Raises:
        NumpruneError: If the architecture is not supported, activations become NaN or infinite, or memory does not
            suffice for one sample.
    """
    model.eval()
    blocks = decoder_blocks(model)
    groups = prunable_groups(model)
    device = torch.device(device or model.device)
    hidden, arguments = enter(model, own_share(input_ids).split(batch_size), device, work)
    saved = Saved(work, "capture")
    for index, block in visit(blocks, device, first=saved.load([hidden])):
        saved.save(index, [hidden])
        moments = {group.name: _Accumulator(linear(block, group.consumer)) for group in groups[index]}
        finite = torch.ones((), dtype=torch.bool, device=device)
        with _observing(moments.values()):

            def through(states: Tensor, block: nn.Module = block, index: int = index, moments: Any = moments) -> Tensor:
                after: Tensor = block(states, **arguments[len(states)][index])
                for accumulator in moments.values():
                    accumulator.add()
                return after

            for batch, states in enumerate(hidden):
                after = arguments.fitting(states, through)
                finite &= torch.isfinite(after).all()
                hidden[batch] = after
        if not finite:
            raise NumpruneError(f"Activations are NaN or infinite after decoder block {index}: check the weights.")
        yield BlockStatistics(index, {name: accumulator.moments() for name, accumulator in moments.items()})


def enter(
    model: PreTrainedModel, batches: tuple[Tensor, ...], device: torch.device, work: Path | None = None
) -> tuple[HiddenStates, "Arguments"]:
    """What enters the first block for each batch, and the keyword arguments of every block.

    The model's own forward pass prepares embeddings, masks and rotary angles; its blocks are stood in for by recorders
    that let hidden states through unchanged.
    """
    hidden = HiddenStates(sum(map(len, batches)), device, work)
    for batch in batches:
        hidden.append(_record(model, batch)[0].hidden)
    return hidden, Arguments(model, batches[0], device)


class Arguments:
    """The keyword arguments of every block by batch size, and the batch size that memory suffices for."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, device: torch.device) -> None:
        self._model, self._input_ids, self._device = model, input_ids, device
        self._of_size: dict[int, list[dict[str, Any]]] = {}
        self._most = len(input_ids)

    def __getitem__(self, size: int) -> list[dict[str, Any]]:
        if size not in self._of_size:
            moved: dict[int, Any] = {}
            recorders = _record(self._model, self._input_ids[:size])
            self._of_size[size] = [_on(self._device, recorder.arguments, moved) for recorder in recorders]
        return self._of_size[size]

    def through(self, index: int, block: nn.Module, states: Tensor) -> Tensor:
        """A batch after a block."""
        return self.fitting(states, lambda piece: block(piece, **self[len(piece)][index]))

    def fitting(self, states: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Computes a batch, in halves where memory does not suffice; smaller batches are remembered and reported.

        Raises:
            NumpruneError: If not even one sample fits.
        """
        results: list[Tensor] = []
        while len(states):
            piece = states[: self._most]
            try:
                results.append(compute(piece))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            else:
                states = states[len(piece) :]
                continue
            self.halve(len(piece))
        return results[0] if len(results) == 1 else torch.cat(results)

    def halve(self, size: int) -> int:
        """Notes that memory does not suffice for a batch; returns the next size to try.

        Raises:
            NumpruneError: If the batch was of one sample.
        """
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            length = self._input_ids.shape[1]
            raise NumpruneError(
                f"{self._device} has too little memory for one sequence of {length} tokens: lower --length "
                "(calibration.length in params.yaml), or use another --device (compute.device)."
            )
        self._most = size // 2
        _LOGGER.warning("out of memory with %d sequences at a time: going on with %d", size, self._most)
        return self._most


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class _Recorder(nn.Module):
    hidden: Tensor
    arguments: dict[str, Any]

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.hidden = hidden_states
        self.arguments = arguments
        return hidden_states


@torch.no_grad()
def _record(model: PreTrainedModel, batch: Tensor) -> list[_Recorder]:
    decoder = model.get_decoder()
    recorders = [_Recorder() for _ in decoder.layers]
    blocks, decoder.layers = decoder.layers, nn.ModuleList(recorders)
    try:
        decoder(input_ids=batch.to(model.device), use_cache=False)
    finally:
        decoder.layers = blocks
    return recorders


def _on(device: torch.device, value: Any, moved: dict[int, Any]) -> Any:
    """A value with its tensors on a device; what many blocks share, such as a mask, is moved once."""
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if isinstance(value, tuple):
        return tuple(_on(device, item, moved) for item in value)
    if isinstance(value, dict):
        return {key: _on(device, item, moved) for key, item in value.items()}
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
        self._seen: tuple[Tensor, Tensor, int]

    def observe(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        self._seen = product(rows, rows), rows.sum(0, dtype=torch.float64), len(rows)

    def add(self) -> None:
        """Counts what was seen last: not before the block is through, as a batch may be tried again in halves."""
        gram, total, count = self._seen
        del self._seen
        self.gram += gram
        self.sum += total
        self.count += count

    def moments(self) -> Moments:
        count = torch.tensor(self.count, device=self.sum.device)
        add_up(self.gram, self.sum, count)
        return Moments(self.gram.to(self.precision), (self.sum / count).to(self.precision), int(count.item()))


@contextmanager
def _observing(accumulators: Collection[_Accumulator]) -> Iterator[None]:
    hooks = [accumulator.consumer.register_forward_pre_hook(accumulator.observe) for accumulator in accumulators]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
