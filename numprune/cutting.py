"""Cutting a model down to the units that stay, and recovering what it knew."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.architectures import PrunableGroup, decoder_blocks, linear, prunable_groups
from numprune.files import replace_on_success
from numprune.memory import in_main_memory
from numprune.overlap import WriteBehind
from numprune.ranks import is_first
from numprune.recovery import Recovery, Streams
from numprune.resume import Saved, reading, writing
from numprune.slicing import Compensation, slice_block
from numprune.statistics import Damping, Measured
from numprune.streaming import forget, store, visit

_COMPENSATIONS: Mapping[Recovery, Compensation] = {"none": "none", "bias": "bias"}


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules of its own and the same tensors: cutting it leaves the first one as it is."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@torch.no_grad()
def cut(
    model: PreTrainedModel,
    kept: Mapping[str, Tensor],
    measured: Measured | None,
    *,
    recovery: Recovery,
    damping: Damping = 0.0,
    work: Path | None = None,
) -> Iterator[int]:
    """Slices a dense model block by block, putting new blocks in; yields each block's index when it is done.

    Args:
        model: A dense model.
        kept: Indices of the units that stay, by the group's name.
        measured: What recovery draws on; needed unless it is `none`.
        recovery: `none`, `bias` (the projections add what the pruned units give on average), `least_squares` (the
            paper's compensation, each projection by itself), `sequential` (each makes up for what went wrong before
            it) or `refit` (sequential, and the producers and the last norm are refitted as well).
        damping: Of the compensation.
        work: Folder that new blocks are written to, which are then read when their turn comes; by default they stay in
            memory. Blocks that it holds already are not made again.

    Raises:
        ValueError: If the recovery needs what was not given.
        NumpruneError: If memory does not suffice for one sample, or the folder cannot be written.
    """
    if measured is None and recovery != "none":
        raise ValueError(f"recovery {recovery!r} needs measured, got None")
    home = model.device
    place = torch.device((measured and measured.device) or home)
    blocks, groups = decoder_blocks(model), prunable_groups(model)
    first = _made(work, len(blocks))
    streams, saved = None, Saved(work, "streams")
    if measured and recovery in {"sequential", "refit"}:
        streams = Streams(model, measured.samples, batch_size=measured.batch_size, device=place, work=work)
        first = streams.resume(saved, most=first)
    compensation = _COMPENSATIONS.get(recovery, "least_squares")
    for index in range(first):
        assert work is not None
        blocks[index] = _restored(blocks[index], groups[index], kept, _path(work, index))
        yield index
    statistics = measured.blocks(range(first, len(blocks))) if measured and compensation != "none" else None
    with WriteBehind() as writer:
        for index, dense in visit(blocks, place, first=first):
            if streams:
                streams.save(saved, before=writer.settle)
            stays = {group.name: kept[group.name].to(place) for group in groups[index]}
            moments = None
            if statistics:
                # To the device as they are: what is made of them, in float64, is twice as large and is made there.
                moments = {name: found.to(place) for name, found in next(statistics).moments.items()}
            while True:
                pruned = _copy(dense)
                slice_block(pruned, groups[index], stays, compensation=compensation, moments=moments, damping=damping)
                if streams is None or streams.recover(dense, pruned, groups[index], stays, refit=recovery == "refit"):
                    break
            del moments  # Before those of the next block come.
            blocks[index] = pruned.to(home) if work is None else _stored(pruned, _path(work, index), writer)
            yield index
        writer.settle()
    if streams and recovery == "refit":
        streams.refit_last_norm(model)


def _copy(block: nn.Module) -> nn.Module:
    """A block with modules of its own and the same tensors, to be sliced."""
    copied = deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    forget(copied)
    return copied


def _path(work: Path, index: int) -> Path:
    return work / f"pruned-{index:03d}.safetensors"


def _made(work: Path | None, blocks: int) -> int:
    """How many blocks a work folder holds."""
    if work is None:
        return 0
    return next((index for index in range(blocks) if not _path(work, index).exists()), blocks)


def _stored(block: nn.Module, path: Path, writer: WriteBehind) -> nn.Module:
    """The block, which from now on lies in a file that is being written, and is to be settled before it is read."""
    writer.settle()
    if is_first():
        tensors = {name: tensor.contiguous() for name, tensor in block.state_dict().items()}
        write = partial(_write, in_main_memory(tensors), path)
        if any(tensor.is_cuda for tensor in tensors.values()):
            writer.begin(write)
        else:
            write()  # It takes little of a CPU's time, and meanwhile the block would take memory beside the next one.
    store(block, {name: (path, name) for name in block.state_dict()})
    return block


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    with writing(path.parent), replace_on_success(path) as temporary:
        save_file(dict(tensors), temporary)


def _restored(dense: nn.Module, groups: Sequence[PrunableGroup], kept: Mapping[str, Tensor], path: Path) -> nn.Module:
    """A block that was cut before: the dense one's modules in the shapes of what is stored."""
    pruned = _copy(dense)
    slice_block(pruned, groups, kept)
    with reading(path), safe_open(path, "pt") as file:
        names = set(file.keys())
    for name in names - pruned.state_dict().keys():  # Biases that recovery added.
        owner, _, parameter = name.rpartition(".")
        layer = linear(pruned, owner)
        setattr(layer, parameter, nn.Parameter(torch.empty_like(layer.weight[:, 0]), requires_grad=False))
    store(pruned, {name: (path, name) for name in names})
    return pruned
