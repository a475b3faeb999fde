"""From a dense model to a pruned one: the steps, each usable alone.

capture_to(folder)  ->  choose_units  ->  make_plan  ->  apply_plan  ->  saving.save_pruned
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.architectures import all_groups, decoder_blocks
from numprune.capture import capture
from numprune.cutting import cut
from numprune.errors import NumpruneError
from numprune.overlap import WriteBehind
from numprune.plan import PruningPlan
from numprune.ranks import is_first
from numprune.recovery import Recovery
from numprune.samples import Samples
from numprune.statistics import BlockStatistics, Damping, Measured


def capture_to(
    folder: Path,
    model: PreTrainedModel,
    samples: Samples | Tensor,
    *,
    batch_size: int | None,
    device: torch.device | str | None = None,
    work: Path | None = None,
) -> Iterator[int]:
    """Writes each block's statistics into a folder; yields the block's index when its file is there.

    A thread writes while the next block is computed. With a work folder, files that are there are not made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = range(len(decoder_blocks(model)))
    if work and all(BlockStatistics.is_saved(folder, block) for block in blocks):
        yield from blocks
        return
    index: int | None = None
    with WriteBehind() as writer:
        settle = writer.settle
        for statistics in capture(model, samples, batch_size=batch_size, device=device, work=work, settle=settle):
            if index is not None:
                settle()
                yield index
            index = statistics.block
            if is_first():
                writer.begin(partial(statistics.in_main_memory().save, folder))
            del statistics
        if index is not None:
            settle()
            yield index


@torch.no_grad()
def apply_plan(
    model: PreTrainedModel,
    plan: PruningPlan,
    measured: Measured | None,
    *,
    recovery: Recovery = "least_squares",
    damping: Damping = 0.0,
    work: Path | None = None,
) -> Iterator[int]:
    """Cuts a dense model by a plan, in place, block by block; yields each block's index when it is done.

    Args:
        model: The dense model that the plan was made for.
        plan: What stays.
        measured: What recovery draws on; needed unless it is `none`.
        recovery: See `numprune.cutting.cut`.
        damping: Of the compensation.
        work: Folder that the new blocks are written to, see `numprune.cutting.cut`.

    Raises:
        NumpruneError: If the plan was made for another model, or the tensors that come out are not those it says.
    """
    plan.check_fits(all_groups(model))
    kept = {name: plan.kept(name) for name in plan.groups}
    yield from cut(model, kept, measured, recovery=recovery, damping=damping, work=work)
    remaining = prunable_parameters(model)
    if remaining != plan.kept_parameters:
        raise NumpruneError(
            f"The pruned tensors hold {remaining:,} parameters, the plan says {plan.kept_parameters:,}."
        )


def prunable_parameters(model: PreTrainedModel) -> int:
    """Parameters of all prunable groups, counted from the tensors."""
    return sum(group.parameters for group in all_groups(model))
