"""Which units of a model stay: rankings, the rises of its loss and the budget brought together.

Cut in several steps, the model is ranked anew after each part of the way, as it then is: cut so far and recovered. What
one layer's units are worth depends on what is left of the others.
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.allocation import Allocated, allocate, allocate_literally
from numprune.architectures import (
    PrunableGroup,
    all_groups,
    channel_indices,
    decoder_blocks,
    linear,
    prunable_groups,
)
from numprune.budget import Costs
from numprune.compensation import compensate
from numprune.cutting import cut, twin
from numprune.plan import Choice
from numprune.progress import Watch, silent
from numprune.pruning import capture_to
from numprune.ranking import Ranking, Selection, load_rankings, rank, save_rankings
from numprune.ranks import is_first, meet
from numprune.recipe import Recipe
from numprune.resume import writing
from numprune.samples import Samples
from numprune.sensitivity import LossProbe, rise_curve
from numprune.statistics import Measured
from numprune.stock import within_stock
from numprune.streaming import visit

# Shares of a group's units after whose removal the rise of the loss is measured; between them it is interpolated.
_PROBED = (0.3, 0.7)
# Blocks whose trials go through the blocks behind them together: what is read falls, what is remembered grows with it.
_BLOCKS_TOGETHER = 32


@torch.no_grad()
def rank_model(
    model: PreTrainedModel,
    recipe: Recipe,
    measured: Measured,
    *,
    ratio: float | None = None,
    work: Path | None = None,
    watch: Watch = silent,
    title: str = "rank",
) -> Iterator[tuple[str, Ranking]]:
    """Ranks the units of every group; yields the group's name and its ranking.

    Args:
        model: The model.
        recipe: Its selection, and whether its allocation needs the rises of the model's loss.
        measured: Of the model; rises are measured on the first `planning_tokens` tokens of its samples.
        ratio: Share that is to go; needed for the selection `box`, which alone depends on it.
        work: Folder that remembers rankings, so that those it holds already are not made again.
        watch: Shows the progress over the blocks that are read, which are more than the model has.
        title: Of the progress.
    """
    blocks = decoder_blocks(model)
    done = _Remembered(work)
    for of_blocks in done.rankings():
        yield from of_blocks.items()
    first = _BLOCKS_TOGETHER * done.count
    place = measured.device or model.device
    probe = None
    if recipe.allocation == "loss_aware" and first < len(blocks):
        samples = Samples.of(measured.samples).within(recipe.planning_tokens)
        if work:  # For hidden states.
            work.mkdir(parents=True, exist_ok=True)
        probe = LossProbe(model, samples, batch_size=measured.batch_size, device=place, first=first, folder=work)
    starts = range(first, len(blocks), _BLOCKS_TOGETHER)
    read = sum((len(blocks) if probe else min(start + _BLOCKS_TOGETHER, len(blocks))) - start for start in starts)
    shown = watch(range(read), read, title)
    for start in starts:
        rankings = _rank_together(
            model, start, recipe, measured, ratio=ratio, probe=probe, through=lambda: next(shown, None)
        )
        done.remember(rankings)
        yield from rankings.items()
    next(shown, None)


def _rank_together(
    model: PreTrainedModel,
    start: int,
    recipe: Recipe,
    measured: Measured,
    *,
    ratio: float | None,
    probe: LossProbe | None,
    through: Callable[[], object],
) -> dict[str, Ranking]:
    """Ranks the groups of a few blocks; the trials that branch off there share one pass through those behind.

    `through` is called after each block.
    """
    rankings: dict[str, Ranking] = {}
    groups, blocks = prunable_groups(model), decoder_blocks(model)
    place = measured.device or model.device
    end = min(start + _BLOCKS_TOGETHER, len(blocks))
    last = len(blocks) if probe else end
    statistics = measured.blocks(range(start, end))
    for index, block in visit(blocks[:last], place, first=start):
        if probe:
            probe.follow(index, block)
        if index >= end:
            through()
            continue
        of_block = next(statistics)
        for group in groups[index]:
            layer, moments = linear(block, group.consumer), of_block.moments[group.name].to(place)
            damping = moments.damping(recipe.damping)
            rankings[group.name] = rank(
                group,
                moments,
                layer.weight,
                selection=recipe.selection,
                ratio=ratio,
                penalty=recipe.penalty,
                damping=damping,
                seed=recipe.seed,
                with_losses=probe is not None,
            )
            if probe:
                order, depth = rankings[group.name].order, recipe.shapes.depth
                for count, weight in _trials(group, order, layer, moments.gram, damping=damping, depth=depth):
                    probe.branch((group.name, count), index, block, layer, weight)
        if probe:
            probe.advance(index, block)
        through()
    return _with_rises(rankings, probe.rises()) if probe else rankings


class _Remembered:
    """Rankings of some blocks each, in files of a folder; nothing is remembered without one."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.count = 0

    def rankings(self) -> Iterator[dict[str, Ranking]]:
        """Those that are there."""
        while (path := self._path()) and path.exists():
            self.count += 1
            yield load_rankings(path)

    def remember(self, rankings: Mapping[str, Ranking]) -> None:
        """Adds the next."""
        if (path := self._path()) and is_first():
            with writing(path.parent):
                save_rankings(rankings, path)
        self.count += 1

    def _path(self) -> Path | None:
        return self._folder and self._folder / f"rankings-{self.count:03d}.safetensors"


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
        measured: Of the dense model.
        rankings: Of the dense model if they are there already.
        watch: Shows the progress of the steps.

    Raises:
        NumpruneError: If the budget cannot be met with the shapes that the recipe allows.
    """
    search = _Search(model, recipe, costs, measured, watch)
    for step in range(1, recipe.steps + 1):
        prefix = f"step {step} of {recipe.steps} " if recipe.steps > 1 else ""
        search.advance(amount * step / recipe.steps, rankings, prefix, step)
        rankings = None
    return search.choice()


class _Search:
    """What has been decided so far, and the model as it then is."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, costs: Costs, measured: Measured, watch: Watch) -> None:
        self._model, self._recipe, self._costs = model, recipe, costs
        self._measured = measured
        self._watch = watch
        self._shapes = within_stock(recipe.shapes, model)
        self._dense = all_groups(model)
        self._kept = {group.name: torch.arange(group.units) for group in self._dense}
        self._lowest_kept: dict[str, float | None] = {}
        self._highest_removed: dict[str, float | None] = dict.fromkeys(self._kept)
        self._threshold = -math.inf

    def advance(self, amount: float, rankings: Mapping[str, Ranking] | None, prefix: str, step: int) -> None:
        """Removes units until so much of the dense model's cost is gone."""
        fresh = all(len(self._kept[group.name]) == group.units for group in self._dense)
        work = self._folder(step, amount)
        model = self._model if fresh else self._cut_so_far(prefix, work)
        groups = all_groups(model)
        left = self._cost(groups)
        amount -= self._cost(self._dense) - left
        if amount <= 0:
            return
        ratio = amount / left
        if rankings is None:
            rankings = self._rank(model, ratio, prefix, work)
        if self._recipe.allocation == "literal":
            allocated = allocate_literally(groups, _masks(rankings, ratio, self._recipe.selection), ratio)
        else:
            allocated = allocate(
                groups,
                rankings,
                amount,
                allocation=self._recipe.allocation,
                costs=self._costs.unit,
                shapes=self._shapes,
            )
        self._remove(allocated, rankings)

    def _folder(self, step: int, amount: float) -> Path | None:
        """What is remembered of a step depends on what stays before it; the scores of `box` on how much goes, too.

        Only one and the same step shares a folder: a search for a latency goes through all of them several times.
        """
        if self._measured.work is None:
            return None
        digest = hashlib.sha256(str(amount if self._recipe.selection == "box" else "").encode())
        for name, kept in self._kept.items():
            digest.update(f"{name}{kept.tolist()}".encode())
        folder = self._measured.work / f"step-{step}-{digest.hexdigest()[:16]}"
        if is_first():
            for other in self._measured.work.glob(f"step-{step}-*"):
                if other != folder:
                    shutil.rmtree(other)  # Of an attempt before, which nobody comes back to.
            folder.mkdir(parents=True, exist_ok=True)
        meet()
        return folder

    def choice(self) -> Choice:
        return Choice(self._kept, self._lowest_kept, self._highest_removed, self._threshold)

    def _cost(self, groups: Sequence[PrunableGroup]) -> float:
        return sum(group.units * self._costs.unit[group.name] for group in groups)

    def _cut_so_far(self, prefix: str, work: Path | None) -> PreTrainedModel:
        model = twin(self._model)
        recipe = self._recipe
        blocks = cut(model, self._kept, self._measured, recovery=recipe.recovery, damping=recipe.damping, work=work)
        for _ in self._watch(blocks, len(decoder_blocks(model)), f"{prefix}recover"):
            pass
        return model

    def _rank(self, model: PreTrainedModel, ratio: float, prefix: str, work: Path | None) -> dict[str, Ranking]:
        measured = self._measured
        with ExitStack() as stack:
            if model is not self._model:
                folder = work or Path(stack.enter_context(TemporaryDirectory()))
                measured = replace(measured, statistics=folder)
                captured = capture_to(
                    folder,
                    model,
                    measured.samples,
                    batch_size=measured.batch_size,
                    device=measured.device,
                    work=work,
                )
                for _ in self._watch(captured, len(decoder_blocks(model)), f"{prefix}capture"):
                    pass
            title = f"{prefix}rank"
            return dict(
                rank_model(model, self._recipe, measured, ratio=ratio, work=work, watch=self._watch, title=title)
            )

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


def _masks(rankings: Mapping[str, Ranking], ratio: float, selection: Selection) -> dict[str, Tensor]:
    """Relaxed masks z at a ratio; those of `newton` are kept for ratio 1, and their distance from 1 grows with it."""
    if selection != "newton":
        return {name: ranking.scores for name, ranking in rankings.items()}
    return {name: 1 - ratio * (1 - ranking.scores) for name, ranking in rankings.items()}


def _trials(
    group: PrunableGroup, order: Tensor, layer: nn.Linear, gram: Tensor, *, damping: float, depth: bool
) -> Iterator[tuple[int, Tensor]]:
    """The consumer's weight, cut and compensated, with a few counts of its units gone."""
    counts = {min(max(1, round(share * group.units)), group.units - 1) for share in _PROBED} - {0}
    if depth:
        counts.add(group.units)
    for count in sorted(counts):
        columns = channel_indices(order[count:].sort().values, group.channels).to(layer.weight.device)
        weight = torch.zeros_like(layer.weight)
        if len(columns):
            subject = f"G_KK of {group.name}"
            weight[:, columns] = compensate(gram, layer.weight, columns, damping, subject=subject)
        yield count, weight


def _with_rises(rankings: Mapping[str, Ranking], measured: Mapping[tuple[str, int], float]) -> dict[str, Ranking]:
    """Adds the curve of the model's loss, from its rises by group and count of removed units."""
    curves = {}
    for name, ranking in rankings.items():
        assert ranking.losses is not None
        of_group = {count: rise for (group, count), rise in measured.items() if group == name}
        # One unit that must stay: there is nothing to decide, nor to measure.
        rises = rise_curve(ranking.losses, of_group) if of_group else torch.zeros_like(ranking.losses)
        curves[name] = replace(ranking, rises=rises)
    return curves
