"""Which units of a model stay: rankings, the rises of its loss and the budget brought together.

Cut in several steps, the model is ranked anew after each part of the way, as it then is: cut so far and recovered. What
one layer's units are worth depends on what is left of the others.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.allocation import Allocated, allocate, allocate_literally
from numprune.architectures import PrunableGroup, channel_indices, decoder_blocks, linear, prunable_groups
from numprune.budget import Costs
from numprune.capture import capture
from numprune.compensation import compensate
from numprune.cutting import cut, twin
from numprune.plan import Choice
from numprune.progress import Watch, silent
from numprune.ranking import Ranking, Selection, rank
from numprune.recipe import Recipe
from numprune.sensitivity import LossProbe, rise_curve
from numprune.statistics import BlockStatistics, Measured

# Shares of a group's units after whose removal the rise of the loss is measured; between them it is interpolated.
_PROBED = (0.3, 0.7)


@torch.no_grad()
def rank_model(
    model: PreTrainedModel,
    statistics: Iterable[BlockStatistics],
    recipe: Recipe,
    measured: Measured,
    *,
    ratio: float | None = None,
) -> Iterator[tuple[str, Ranking]]:
    """Ranks the units of every group; yields the group's name and its ranking.

    Args:
        model: The model; for `loss_aware` it is moved to the device as a whole.
        statistics: Of its blocks, in order.
        recipe: Its selection, and whether its allocation needs the rises of the model's loss.
        measured: Its first `planning_samples` token sequences are what rises are measured on.
        ratio: Share that is to go; needed for the selection `box`, which alone depends on it.
    """
    loss_aware = recipe.allocation == "loss_aware"
    place = measured.device or model.device
    probe = None
    if loss_aware:
        nn.Module.to(model, place)
        probe = LossProbe(model, measured.input_ids[: recipe.planning_samples], batch_size=measured.batch_size)
    for block, groups, of_block in zip(decoder_blocks(model), prunable_groups(model), statistics, strict=True):
        for group in groups:
            layer, moments = linear(block, group.consumer), of_block.moments[group.name]
            damping = moments.damping(recipe.damping)
            ranking = rank(
                group,
                moments,
                layer.weight.to(place),
                selection=recipe.selection,
                ratio=ratio,
                penalty=recipe.penalty,
                damping=damping,
                seed=recipe.seed,
                with_losses=loss_aware,
            )
            if probe:
                ranking = _with_rises(
                    ranking, probe, group, layer, moments.gram, damping=damping, depth=recipe.shapes.depth
                )
            yield group.name, ranking
        if probe:
            probe.advance()


def choose_units(
    model: PreTrainedModel,
    recipe: Recipe,
    costs: Costs,
    amount: float,
    measured: Measured,
    *,
    rankings: Mapping[str, Ranking] | None = None,
    watch: Watch = silent,
) -> Choice:
    """Decides which units of a dense model stay.

    Args:
        model: The dense model; it stays as it is.
        recipe: How to decide.
        costs: Of one unit of every group.
        amount: How much of it must go.
        measured: Of the dense model; between two steps its first `planning_samples` token sequences are used.
        rankings: Of the dense model if they are there already.
        watch: Shows the progress of the steps.

    Raises:
        NumpruneError: If the budget cannot be met with the shapes that the recipe allows.
    """
    search = _Search(model, recipe, costs, measured, watch)
    for step in range(1, recipe.steps + 1):
        prefix = f"step {step} of {recipe.steps} " if recipe.steps > 1 else ""
        search.advance(amount * step / recipe.steps, rankings, prefix)
        rankings = None
    return search.choice()


class _Search:
    """What has been decided so far, and the model as it then is."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, costs: Costs, measured: Measured, watch: Watch) -> None:
        self._model, self._recipe, self._costs = model, recipe, costs
        self._planning = replace(measured, input_ids=measured.input_ids[: recipe.planning_samples])
        self._watch = watch
        self._dense = _groups(model)
        self._kept = {group.name: torch.arange(group.units) for group in self._dense}
        self._lowest_kept: dict[str, float | None] = {}
        self._highest_removed: dict[str, float | None] = dict.fromkeys(self._kept)
        self._threshold = -math.inf

    def advance(self, amount: float, rankings: Mapping[str, Ranking] | None, prefix: str) -> None:
        """Removes units until so much of the dense model's cost is gone."""
        fresh = all(len(self._kept[group.name]) == group.units for group in self._dense)
        model = self._model if fresh else self._cut_so_far(prefix)
        groups = _groups(model)
        left = self._cost(groups)
        amount -= self._cost(self._dense) - left
        if amount <= 0:
            return
        ratio = amount / left
        if rankings is None:
            rankings = self._rank(model, ratio, prefix)
        if self._recipe.allocation == "literal":
            allocated = allocate_literally(groups, _masks(rankings, ratio, self._recipe.selection), ratio)
        else:
            allocated = allocate(
                groups,
                rankings,
                amount,
                allocation=self._recipe.allocation,
                costs=self._costs.unit,
                shapes=self._recipe.shapes,
            )
        self._remove(allocated, rankings)

    def choice(self) -> Choice:
        return Choice(self._kept, self._lowest_kept, self._highest_removed, self._threshold)

    def _cost(self, groups: Sequence[PrunableGroup]) -> float:
        return sum(group.units * self._costs.unit[group.name] for group in groups)

    def _cut_so_far(self, prefix: str) -> PreTrainedModel:
        model = twin(self._model)
        recipe = self._recipe
        blocks = cut(model, self._kept, self._planning, recovery=recipe.recovery, damping=recipe.damping)
        for _ in self._watch(blocks, len(decoder_blocks(model)), f"{prefix}recover"):
            pass
        return model

    def _rank(self, model: PreTrainedModel, ratio: float, prefix: str) -> dict[str, Ranking]:
        planning = self._planning
        if model is self._model:
            statistics: Iterable[BlockStatistics] = map(planning.block, range(len(decoder_blocks(model))))
        else:
            statistics = capture(model, planning.input_ids, batch_size=planning.batch_size, device=planning.device)
        ranked = rank_model(model, statistics, self._recipe, planning, ratio=ratio)
        return dict(self._watch(ranked, len(_groups(model)), f"{prefix}rank"))

    def _remove(self, allocated: Allocated, rankings: Mapping[str, Ranking]) -> None:
        self._threshold = max(self._threshold, allocated.threshold)
        for name, count in allocated.removed.items():
            ranking = rankings[name]
            goes, stays = ranking.order[:count], ranking.order[count:]
            self._kept[name] = self._kept[name][stays.sort().values]
            self._lowest_kept[name] = ranking.scores[stays].min().item() if len(stays) else None
            if count:
                highest = ranking.scores[goes].max().item()
                before = self._highest_removed[name]
                self._highest_removed[name] = highest if before is None else max(before, highest)


def _groups(model: PreTrainedModel) -> list[PrunableGroup]:
    return [group for groups in prunable_groups(model) for group in groups]


def _masks(rankings: Mapping[str, Ranking], ratio: float, selection: Selection) -> dict[str, Tensor]:
    """Relaxed masks z at a ratio; those of `newton` are kept for ratio 1, and their distance from 1 grows with it."""
    if selection != "newton":
        return {name: ranking.scores for name, ranking in rankings.items()}
    return {name: 1 - ratio * (1 - ranking.scores) for name, ranking in rankings.items()}


def _with_rises(
    ranking: Ranking,
    probe: LossProbe,
    group: PrunableGroup,
    layer: nn.Linear,
    gram: Tensor,
    *,
    damping: float,
    depth: bool,
) -> Ranking:
    """Adds the curve of the model's loss, measured with the group's consumer cut and compensated at a few counts."""
    assert ranking.losses is not None
    counts = {min(max(1, round(share * group.units)), group.units - 1) for share in _PROBED} - {0}
    if depth:
        counts.add(group.units)
    measured = {}
    for count in counts:
        columns = channel_indices(ranking.order[count:].sort().values, group.channels).to(layer.weight.device)
        weight = torch.zeros_like(layer.weight)
        if len(columns):
            subject = f"G_KK of {group.name}"
            weight[:, columns] = compensate(gram, layer.weight, columns, damping, subject=subject)
        measured[count] = probe.rise(layer, weight)
    # One unit that must stay: there is nothing to decide, nor to measure.
    rises = rise_curve(ranking.losses, measured) if measured else torch.zeros_like(ranking.losses)
    return replace(ranking, rises=rises)
