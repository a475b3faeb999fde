"""Cutting a model down to the units that stay, and recovering what it knew."""

from collections.abc import Iterator, Mapping
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.architectures import decoder_blocks, prunable_groups
from numprune.recovery import Recovery, Streams
from numprune.slicing import Compensation, slice_block
from numprune.statistics import Damping, Measured

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

    Raises:
        ValueError: If the recovery needs what was not given.
    """
    if measured is None and recovery != "none":
        raise ValueError(f"recovery {recovery!r} needs measured, got None")
    home = model.device
    place = torch.device((measured and measured.device) or home)
    streams = None
    if measured and recovery in {"sequential", "refit"}:
        streams = Streams(model, measured.input_ids, batch_size=measured.batch_size, device=place)
    compensation = _COMPENSATIONS.get(recovery, "least_squares")
    blocks = decoder_blocks(model)
    for index, groups in enumerate(prunable_groups(model)):
        stays = {group.name: kept[group.name].to(place) for group in groups}
        dense = blocks[index].to(place)
        pruned = deepcopy(dense)
        moments = measured.block(index).moments if measured and compensation != "none" else None
        slice_block(pruned, groups, stays, compensation=compensation, moments=moments, damping=damping)
        if streams:
            streams.recover(dense, pruned, groups, stays, refit=recovery == "refit")
        blocks[index] = pruned.to(home)
        yield index
    if streams and recovery == "refit":
        streams.refit_last_norm(model)
