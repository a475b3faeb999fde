"""From a dense model to a pruned one: the steps, each usable alone.

capture_to(folder)  ->  score  ->  make_plan  ->  apply_plan  ->  checkpoint.save_pruned
"""

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.architectures import decoder_blocks, linear, prunable_groups
from numprune.capture import capture
from numprune.errors import NumpruneError
from numprune.newton import newton_direction
from numprune.plan import PruningPlan
from numprune.recovery import Recovery, Streams
from numprune.slicing import Compensation, slice_block
from numprune.statistics import BlockStatistics
from numprune.threshold import Threshold


@dataclass(frozen=True)
class Recipe:
    """How units are scored, which of them go, and how the rest is compensated. The defaults are the paper's.

    Attributes:
        penalty: Lambda of the numerical score.
        score_damping: Of the score's matrix, relative to its mean diagonal.
        threshold: How the global threshold is found, see `numprune.threshold`.
        recovery: How the kept weights make up for the pruned ones, see `apply_plan`.
        compensation_damping: Of G_KK, relative to its mean diagonal.
    """

    penalty: float = math.inf
    score_damping: float = 1e-6
    threshold: Threshold = "parameters"
    recovery: Recovery = "least_squares"
    compensation_damping: float = 1e-6


RECIPES: Mapping[str, Recipe] = {"paper": Recipe()}


def recipe_name(recipe: Recipe) -> str:
    """The name of a preset, or `custom`."""
    return next((name for name, preset in RECIPES.items() if preset == recipe), "custom")


def capture_to(
    folder: Path,
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    batch_size: int,
    device: torch.device | str | None = None,
) -> Iterator[int]:
    """Writes each block's statistics into a folder; yields the block's index when its file is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for statistics in capture(model, input_ids, batch_size=batch_size, device=device):
        statistics.save(folder)
        yield statistics.block


@torch.no_grad()
def score_directions(
    model: PreTrainedModel, statistics: Path, recipe: Recipe, device: torch.device | str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the Newton direction d of every group's units; at ratio rho their scores are 1 - rho d.

    The direction of a unit is the mean over its channels. Inputs are scaled to a Frobenius norm of 1, as in the paper;
    it matters for a finite penalty alone.
    """
    for index, (block, groups) in enumerate(zip(decoder_blocks(model), prunable_groups(model), strict=True)):
        moments = BlockStatistics.load(statistics, index).moments
        for group in groups:
            weight = linear(block, group.consumer).weight.to(device or model.device)
            gram = moments[group.name].gram.to(weight.device, torch.float64)
            direction, _ = newton_direction(
                gram / gram.trace(),
                weight,
                penalty=recipe.penalty,
                damping=recipe.score_damping,
                subject=f"The score's matrix of {group.name}",
            )
            yield group.name, direction.view(group.units, group.channels).mean(dim=1).cpu()


def scores_at(directions: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Scores z of all units at a ratio, by the group's name."""
    return {name: 1 - ratio * direction for name, direction in directions.items()}


@dataclass(frozen=True)
class Measured:
    """What recovery draws on.

    Attributes:
        statistics: Folder with the blocks' statistics.
        input_ids: (samples, length) calibration tokens.
        batch_size: Samples that go through a block together.
    """

    statistics: Path
    input_ids: Tensor
    batch_size: int


@torch.no_grad()
def apply_plan(
    model: PreTrainedModel,
    plan: PruningPlan,
    measured: Measured | None,
    *,
    recovery: Recovery = "least_squares",
    damping: float = 0.0,
    device: torch.device | str | None = None,
) -> Iterator[int]:
    """Slices a dense model in place, block by block; yields each block's index when it is done.

    Args:
        model: The dense model that the plan was made for.
        plan: What stays.
        measured: What recovery draws on; None slices without any.
        recovery: `none`, `bias` (the projections add what the pruned units give on average), `least_squares` (the
            paper's compensation, each projection by itself), `sequential` (each makes up for what went wrong before
            it) or `refit` (sequential, and the producers are refitted as well).
        damping: Of the compensation.
        device: Where blocks and equations are computed; by default where the model is.

    Raises:
        NumpruneError: If the plan was made for another model, or the tensors that come out are not those it says.
    """
    plan.check_fits(group for groups in prunable_groups(model) for group in groups)
    home = model.device
    place = torch.device(device or home)
    measured = None if recovery == "none" else measured
    compensation: Compensation = "none"
    if measured:
        compensation = "bias" if recovery == "bias" else "least_squares"
    streams = None
    if measured and recovery in {"sequential", "refit"}:
        streams = Streams(model, measured.input_ids, batch_size=measured.batch_size, device=place)
    blocks = decoder_blocks(model)
    for index, groups in enumerate(prunable_groups(model)):
        kept = {group.name: plan.kept(group.name).to(place) for group in groups}
        dense = blocks[index].to(place)
        pruned = deepcopy(dense) if streams else dense
        moments = BlockStatistics.load(measured.statistics, index).moments if measured else None
        slice_block(pruned, groups, kept, compensation=compensation, moments=moments, damping=damping)
        if streams:
            streams.recover(dense, pruned, groups, kept, refit=recovery == "refit")
        blocks[index] = pruned.to(home)
        yield index
    remaining = prunable_parameters(model)
    if remaining != plan.kept_parameters:
        raise NumpruneError(
            f"The pruned tensors hold {remaining:,} parameters, the plan says {plan.kept_parameters:,}."
        )


def prunable_parameters(model: PreTrainedModel) -> int:
    """Parameters of all prunable groups, counted from the tensors."""
    return sum(group.parameters for groups in prunable_groups(model) for group in groups)
