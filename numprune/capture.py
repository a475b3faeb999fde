"""The calibration pass: block by block, the second moments of what enters the output projections.

The hidden states of all samples are carried from block to block; activations inside a block live for one batch, and
the moments of one block at a time are handed out. A block visits the compute device only while it runs.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.architectures import PrunableGroup, decoder_blocks, linear, prunable_groups
from numprune.batches import fitting_batch
from numprune.errors import NumpruneError
from numprune.memory import HiddenStates, is_out_of_memory
from numprune.ranks import add_up, own_share
from numprune.resume import Saved
from numprune.samples import Samples
from numprune.second_moments import SecondMoments, products
from numprune.statistics import BlockStatistics, Moments
from numprune.streaming import visit

_LOGGER = logging.getLogger(__name__)


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    samples: Samples | Tensor,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    work: Path | None = None,
    settle: Callable[[], object] = lambda: None,
) -> Iterator[BlockStatistics]:
    """Runs calibration samples through a model and yields each block's statistics as soon as it is through.

    Args:
        model: A supported decoder-only model.
        samples: Samples, or their (samples, length) token ids.
        batch_size: Samples that go through a block together, by default `fitting_batch`; halved where memory does not
            suffice.
        device: Where blocks compute; by default where the model is.
        work: Folder that remembers how far this came. Where it already holds something, blocks that were handed out
            before are passed over.
        settle: Called before that is written: what was made of the statistics that were handed out has to be kept by
            then.

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
    hidden, arguments = enter(model, own_share(Samples.of(samples)), batch_size, device, work)
    saved = Saved(work, "capture")
    for index, block in visit(blocks, device, first=saved.load([hidden])):
        saved.save(index, [hidden], before=settle)
        yield _through(index, block, groups[index], hidden, arguments)


def _through(
    index: int, block: nn.Module, groups: Sequence[PrunableGroup], hidden: HiddenStates, arguments: "Arguments"
) -> BlockStatistics:
    """Carries hidden states through a block, in place, and measures what enters its consumers."""
    moments = {group.name: _Accumulator(linear(block, group.consumer)) for group in groups}
    finite = torch.ones((), dtype=torch.bool, device=hidden.device)

    def compute(states: Tensor, start: int) -> Tensor:
        for accumulator in moments.values():
            accumulator.present = arguments.present(start, len(states))
        after: Tensor = block(states, **arguments.of(start, len(states))[index])
        for accumulator in moments.values():
            accumulator.add()
        return after

    with _observing(moments.values()):
        for batch, ((start, _), states) in enumerate(zip(hidden.bounds, hidden, strict=True)):
            after = arguments.fitting(states, start, compute)
            finite &= torch.isfinite(after).all()
            hidden[batch] = after
    if not finite:
        raise NumpruneError(f"Activations are NaN or infinite after decoder block {index}: check the weights.")
    return BlockStatistics(index, {name: accumulator.moments() for name, accumulator in moments.items()})


def enter(
    model: PreTrainedModel, samples: Samples, batch_size: int | None, device: torch.device, work: Path | None = None
) -> tuple[HiddenStates, "Arguments"]:
    """What enters the first block for each batch of samples, and the keyword arguments of every block.

    The model's own forward pass prepares embeddings, masks and rotary angles; its blocks are stood in for by recorders
    that let hidden states through unchanged.
    """
    batch_size = batch_size or fitting_batch(model, samples.length, device)
    hidden = HiddenStates(len(samples), device, work)
    for batch in samples.split(batch_size):
        hidden.append(_record(model, batch)[0].hidden)
    return hidden, Arguments(model, samples, batch_size, device)


class Arguments:
    """The keyword arguments of every block for a batch of samples, and the batch size that memory suffices for.

    Where token ids are all that a model is given, they depend on the size of the batch alone, and are kept.
    """

    def __init__(self, model: PreTrainedModel, samples: Samples, batch_size: int, device: torch.device) -> None:
        self._model, self._samples, self._device = model, samples, device
        self._of_size: dict[int, list[dict[str, Any]]] = {}
        self._most = min(batch_size, len(samples))

    def of(self, start: int, size: int) -> list[dict[str, Any]]:
        """The arguments of every block for so many samples from one on."""
        if self._samples.inputs:
            return self._recorded(start, size)
        if size not in self._of_size:
            self._of_size[size] = self._recorded(0, size)
        return self._of_size[size]

    def present(self, start: int, size: int) -> Tensor | None:
        """Indices of the tokens of so many samples from one on that are no padding; None: all of them."""
        if "attention_mask" not in self._samples.inputs:
            return None
        # Counted where samples are: on a GPU it would be waited for how many there are.
        return self._samples[start : start + size].present().flatten().nonzero().squeeze(1).to(self._device)

    def through(self, index: int, block: nn.Module, hidden: HiddenStates) -> Iterator[Tensor]:
        """Batch by batch, hidden states after a block."""
        for (start, _), states in zip(hidden.bounds, hidden, strict=True):
            yield self.fitting(states, start, lambda piece, first: block(piece, **self.of(first, len(piece))[index]))

    def fitting(self, states: Tensor, start: int, compute: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Computes a batch, in halves where memory does not suffice; smaller batches are remembered and reported.

        Args:
            states: Of the batch.
            start: Its first sample.
            compute: Is given some of the states and the first of their samples.

        Raises:
            NumpruneError: If not even one sample fits.
        """
        results: list[Tensor] = []
        while len(states):
            piece = states[: self._most]
            try:
                results.append(compute(piece, start))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            else:
                states, start = states[len(piece) :], start + len(piece)
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
            length = self._samples.length
            raise NumpruneError(
                f"{self._device} has too little memory for one sequence of {length} tokens: lower --length "
                "(calibration.length in params.yaml), or use another --device (compute.device)."
            )
        self._most = size // 2
        _LOGGER.warning("out of memory with %d sequences at a time: going on with %d", size, self._most)
        return self._most

    def _recorded(self, start: int, size: int) -> list[dict[str, Any]]:
        moved: dict[int, Any] = {}
        recorders = _record(self._model, self._samples[start : start + size])
        return [_on(self._device, recorder.arguments, moved) for recorder in recorders]


def token_rows(states: Tensor, present: Tensor | None) -> Tensor:
    """(tokens, D) of (..., D) states: of all tokens, or of those whose indices are given."""
    rows = states.flatten(0, -2)
    return rows if present is None else rows[present]


class _Recorder(nn.Module):
    hidden: Tensor
    arguments: dict[str, Any]

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.hidden = hidden_states
        self.arguments = arguments
        return hidden_states


@torch.no_grad()
def _record(model: PreTrainedModel, batch: Samples) -> list[_Recorder]:
    decoder = model.get_decoder()
    recorders = [_Recorder() for _ in decoder.layers]
    blocks, decoder.layers = decoder.layers, nn.ModuleList(recorders)
    try:
        given = batch.to(model.device)
        decoder(input_ids=given.input_ids, use_cache=False, **given.inputs)
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
        self.gram = SecondMoments(size, device)
        self.sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.count = 0
        self.present: Tensor | None = None
        self._seen: tuple[list[Tensor], Tensor, int]

    def observe(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = token_rows(inputs[0], self.present)
        self._seen = products(rows), rows.sum(0, dtype=torch.float64), len(rows)

    def add(self) -> None:
        """Counts what was seen last: not before the block is through, as a batch may be tried again in halves."""
        stripes, total, count = self._seen
        del self._seen
        self.gram.add(stripes)
        self.sum += total
        self.count += count

    def moments(self) -> Moments:
        gram, count = self.gram.total(), torch.tensor(self.count)
        add_up(gram, self.sum, count)
        return Moments(gram.to(self.precision), (self.sum / count).to(self.precision), int(count.item()))


@contextmanager
def _observing(accumulators: Collection[_Accumulator]) -> Iterator[None]:
    hooks = [accumulator.consumer.register_forward_pre_hook(accumulator.observe) for accumulator in accumulators]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
