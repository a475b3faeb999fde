"""How many units every group gives up: one price for all layers, until the budget is met.

Each group has a potential, a number for every count of units that are gone, whose rise per cost is the price of going
on. Prices come from the lower convex hull of the potential: where a cheap unit follows a dear one, both go together.
All groups' steps are then taken in the order of their prices. With `global` the price is the score itself, which is the
paper's global threshold on parameters; with `loss_aware` it is the rise of the model's loss per parameter.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from numprune.architectures import KINDS, PrunableGroup
from numprune.errors import NumpruneError
from numprune.ranking import Ranking

Allocation = Literal["global", "literal", "uniform", "loss_aware"]

# Shares of a budget below this are rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Shapes:
    """Which widths layers may have.

    Attributes:
        heads: The query heads that a layer keeps are a multiple of this, or all.
        channels: The MLP channels that a layer keeps are a multiple of this, or all.
        uniform: All layers keep as many heads, and as many channels, as the others, in numbers that make an ordinary
            checkpoint, see `numprune.stock.within_stock`.
        depth: Whole attention or MLP modules may go.
    """

    heads: int = 1
    channels: int = 1
    uniform: bool = False
    depth: bool = False

    def removable(self, group: PrunableGroup) -> list[int]:
        """How many of a group's units may go, ascending from none."""
        multiple = self.heads if group.kind == "attention" else self.channels
        least = 0 if self.depth else 1
        kept = [k for k in range(group.units - 1, least - 1, -1) if k * group.width % multiple == 0]
        return [0, *(group.units - k for k in kept)]


class Allocated(NamedTuple):
    """What every group gives up.

    Attributes:
        removed: How many of its units go, by the group's name.
        threshold: The highest price that was paid; minus infinity if nothing goes.
    """

    removed: dict[str, int]
    threshold: float


def allocate(
    groups: Sequence[PrunableGroup],
    rankings: Mapping[str, Ranking],
    amount: float,
    *,
    allocation: Allocation = "global",
    costs: Mapping[str, float] | None = None,
    shapes: Shapes = Shapes(),
) -> Allocated:
    """Decides how many units every group gives up.

    Units that no longer fit the budget are passed over while smaller ones still do; at the end the one goes that
    overshoots it least. What is removed is so at least the amount; the excess is less than the smallest unit that a
    group could still give up before the last one went.

    Args:
        groups: All prunable groups of the model.
        rankings: Of every group, by its name.
        amount: How much cost must go, above 0.
        allocation: `global` takes the lowest scores of all groups, `uniform` the same share of every group,
            `loss_aware` what raises the model's loss least per cost. (`literal` is `allocate_literally`.)
        costs: Of one unit, by the group's name; by default its parameters.
        shapes: Which widths layers may have.

    Raises:
        ValueError: If an argument is out of range.
        NumpruneError: If the amount cannot be reached, or the groups do not allow uniform shapes.
    """
    if not amount > 0:
        raise ValueError(f"amount must be above 0, got {amount}")
    costs = costs or {group.name: group.unit_parameters for group in groups}
    bundles = _bundles(groups, rankings, allocation, costs, shapes)
    most = sum(bundle.cost_of(bundle.options[-1]) for bundle in bundles)
    if most < amount * (1 - _ROUNDING):
        share = most / sum(group.units * costs[group.name] for group in groups)
        raise NumpruneError(
            f"The budget cannot be met: {amount:.4g} must go, but the recipe's shapes let at most {most:.4g} go, a "
            f"share of {share:.3f}. Ask for less or loosen the shapes."
        )
    threshold = _walk(bundles, amount)
    return Allocated({group.name: bundle.removed for bundle in bundles for group in bundle.groups}, threshold)


def unit_prices(
    groups: Sequence[PrunableGroup],
    rankings: Mapping[str, Ranking],
    *,
    allocation: Allocation = "global",
    costs: Mapping[str, float] | None = None,
    shapes: Shapes = Shapes(),
) -> dict[str, Tensor]:
    """The price of every unit, which `allocate` compares with its threshold.

    Units whose price is below the threshold went, but for those that did not fit what was left of the budget.

    Args:
        groups: All prunable groups of the model.
        rankings: Of every group, by its name.
        allocation: As for `allocate`.
        costs: As for `allocate`.
        shapes: As for `allocate`.

    Returns:
        (units,) float64 in the order in which the group's units go, by its name; infinite where a unit may not go.
    """
    costs = costs or {group.name: group.unit_parameters for group in groups}
    prices: dict[str, Tensor] = {}
    for bundle in _bundles(groups, rankings, allocation, costs, shapes):
        of_units = torch.full((bundle.groups[0].units,), math.inf, dtype=torch.float64)
        for start, end, price in bundle.steps:
            of_units[start:end] = price
        prices |= {group.name: of_units for group in bundle.groups}
    return prices


def allocate_literally(
    groups: Sequence[PrunableGroup], masks: Mapping[str, Tensor], ratio: float, *, minimum: int = 1
) -> Allocated:
    """The paper's Eq. 8 as printed: the rho-quantile over the count of units.

    Scores are multiplied by alpha, the parameters of a unit over those of the smallest, 4 D_h / 3 for a head. The share
    of parameters that goes falls short of rho.

    Args:
        groups: All prunable groups of the model.
        masks: (units,) relaxed masks z of every group at this ratio, by its name.
        ratio: Rho, in (0, 1).
        minimum: Units that every group keeps.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be in (0, 1), got {ratio}")
    smallest = min(group.unit_parameters for group in groups)
    scores, owners = [], []
    for index, group in enumerate(groups):
        score = masks[group.name].double() * (group.unit_parameters / smallest)
        candidates = score.sort().values[: group.units - minimum]
        scores.append(candidates)
        owners.append(torch.full((len(candidates),), index))
    ranked, order = torch.cat(scores).sort(stable=True)
    count = min(math.ceil(ratio * sum(group.units for group in groups)), len(ranked))
    removed = torch.bincount(torch.cat(owners)[order[:count]], minlength=len(groups)).tolist()
    threshold = ranked[count - 1].item() if count else -math.inf
    return Allocated({group.name: n for group, n in zip(groups, removed, strict=True)}, threshold)


@dataclass
class _Bundle:
    """Groups that give up the same count of units: one group, or all of a kind where shapes are uniform.

    Attributes:
        groups: Of equal size.
        options: Counts of units that may go, ascending from 0.
        unit_cost: Of one unit of every group.
        steps: (a, b, price) of the hull's edges from option to option, by rising price.
        removed: The count that is gone.
    """

    groups: Sequence[PrunableGroup]
    options: list[int]
    unit_cost: float
    steps: list[tuple[int, int, float]]
    removed: int = 0

    @classmethod
    def of(
        cls,
        groups: Sequence[PrunableGroup],
        allocation: Allocation,
        rankings: Mapping[str, Ranking],
        costs: Mapping[str, float],
        shapes: Shapes,
    ) -> "_Bundle":
        options = shapes.removable(groups[0])
        cost = sum(costs[group.name] for group in groups)
        potential = torch.stack([_potential(allocation, rankings[group.name], costs[group.name]) for group in groups])
        heights = (potential.sum(dim=0)[options] / cost).tolist()
        return cls(groups, options, cost, _hull_steps(options, heights))

    def covering(self, cost: float) -> Iterator[tuple[int, float]]:
        """The smallest option that saves so much more, if there is one, and the price there."""
        enough = next((n for n in self.options if self.cost_of(n - self.removed) >= cost), None)
        yield from ((enough, price) for a, b, price in self.steps if enough is not None and a < enough <= b)

    def cost_of(self, removed: int) -> float:
        """What removing so many units from each group saves."""
        return removed * self.unit_cost


def _bundles(
    groups: Sequence[PrunableGroup],
    rankings: Mapping[str, Ranking],
    allocation: Allocation,
    costs: Mapping[str, float],
    shapes: Shapes,
) -> list[_Bundle]:
    return [_Bundle.of(bundle, allocation, rankings, costs, shapes) for bundle in _bundled(groups, shapes, allocation)]


def _bundled(
    groups: Sequence[PrunableGroup], shapes: Shapes, allocation: Allocation
) -> Sequence[Sequence[PrunableGroup]]:
    if not shapes.uniform and allocation != "uniform":
        return [[group] for group in groups]
    bundles = [[group for group in groups if group.kind == kind] for kind in KINDS]
    for bundle in bundles:
        if len({(group.units, group.width) for group in bundle}) > 1:
            raise NumpruneError("Uniform shapes need a model whose layers have equal widths; this one's differ.")
    return [bundle for bundle in bundles if bundle]


def _potential(allocation: Allocation, ranking: Ranking, cost: float) -> Tensor:
    """(units + 1,), whose rise from one count of removed units to the next, over their cost, is the price."""
    if allocation == "loss_aware":
        if ranking.rises is None:
            raise ValueError("loss_aware needs rankings with rises, got None")
        return ranking.rises
    if allocation == "uniform":
        prices = torch.arange(1, len(ranking.order) + 1, dtype=torch.float64) / len(ranking.order)
    else:
        prices = ranking.scores[ranking.order].double()
    return torch.cat([prices.new_zeros(1), (cost * prices).cumsum(0)])


def _hull_steps(options: Sequence[int], heights: Sequence[float]) -> list[tuple[int, int, float]]:
    """The edges of the lower convex hull over the points (option, height): from, to, and rise per unit."""
    hull: list[int] = []

    def slope(a: int, b: int) -> float:
        return (heights[b] - heights[a]) / (options[b] - options[a])

    for point in range(len(options)):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) > slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(options[a], options[b], slope(a, b)) for a, b in pairwise(hull)]


def _walk(bundles: Sequence[_Bundle], amount: float) -> float:
    """Takes steps by rising price until the amount is gone; returns the highest price paid."""
    tolerance = _ROUNDING * amount
    steps = sorted(((price, i, a, b) for i, bundle in enumerate(bundles) for a, b, price in bundle.steps))
    left, threshold = amount, -math.inf
    for price, index, start, end in steps:
        bundle = bundles[index]
        if bundle.removed != start:
            continue  # A step before this one did not fit.
        fitting = [n for n in bundle.options if start < n <= end and bundle.cost_of(n - start) <= left + tolerance]
        if fitting:
            left -= bundle.cost_of(fitting[-1] - start)
            bundle.removed, threshold = fitting[-1], price
    if left > tolerance:
        price, index, removed = min(
            (bundle.cost_of(enough - bundle.removed), price, index, enough)
            for index, bundle in enumerate(bundles)
            for enough, price in bundle.covering(left - tolerance)
        )[1:]
        bundles[index].removed = removed
        threshold = max(threshold, price)
    return threshold
