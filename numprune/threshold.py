"""The global threshold: which units go when those of all layers are ranked together (paper, Eq. 8)."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from numprune.architectures import PrunableGroup
from numprune.errors import NumpruneError

Threshold = Literal["parameters", "literal"]


class Selection(NamedTuple):
    """Which units stay.

    Attributes:
        kept: Ascending indices of the units that stay, by the group's name.
        threshold: The highest score that was removed.
    """

    kept: dict[str, Tensor]
    threshold: float


def select_units(
    groups: Sequence[PrunableGroup],
    scores: Mapping[str, Tensor],
    ratio: float,
    *,
    threshold: Threshold = "parameters",
    minimum: int = 1,
) -> Selection:
    """Removes the lowest-scored units of all groups.

    Args:
        groups: All prunable groups of the model.
        scores: (units,) scores z of every group, by its name.
        ratio: Share rho of the units' parameters to remove, in (0, 1).
        threshold: `parameters` walks up from the lowest score, adding true parameter counts, and stops nearest to
            rho. `literal` is Eq. 8 as printed: scores times alpha, the parameters of a unit over those of a channel
            (4 D_h / 3 for a head), and the rho-quantile of the count of units, which removes a smaller share than rho.
        minimum: Units that every group keeps.

    Raises:
        ValueError: If the ratio is out of range.
        NumpruneError: If the ratio cannot be reached with `minimum` units kept everywhere.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be in (0, 1), got {ratio}")
    ranked, costs, owners = _candidates(groups, scores, threshold, minimum)
    order = torch.argsort(ranked, stable=True)
    if threshold == "parameters":
        count = _units_for_parameters(costs[order], ratio * sum(group.parameters for group in groups), ratio, groups)
    else:
        count = min(math.ceil(ratio * sum(group.units for group in groups)), len(order))
    removed = order[:count]
    kept = {}
    for index, group in enumerate(groups):
        mine = removed[owners[removed, 0] == index]
        stays = torch.ones(group.units, dtype=torch.bool)
        stays[owners[mine, 1]] = False
        kept[group.name] = stays.nonzero().squeeze(1)
    return Selection(kept, ranked[removed[-1]].item() if count else -math.inf)


def _candidates(
    groups: Sequence[PrunableGroup], scores: Mapping[str, Tensor], threshold: Threshold, minimum: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, parameter counts and (group, unit) of all units that may go: a group's best `minimum` may not."""
    ranked, costs, owners = [], [], []
    cheapest = min(group.unit_parameters for group in groups)
    for index, group in enumerate(groups):
        score = scores[group.name].double()
        if threshold == "literal":
            score = score * (group.unit_parameters / cheapest)
        units = torch.argsort(score, descending=True, stable=True)[minimum:].sort().values
        ranked.append(score[units])
        costs.append(torch.full_like(units, group.unit_parameters))
        owners.append(torch.stack([torch.full_like(units, index), units], dim=1))
    return torch.cat(ranked), torch.cat(costs), torch.cat(owners)


def _units_for_parameters(costs: Tensor, budget: float, ratio: float, groups: Sequence[PrunableGroup]) -> int:
    reached = costs.double().cumsum(0)  # Exact up to 2^53 parameters.
    if not len(reached) or reached[-1] < budget:
        most = (reached[-1].item() if len(reached) else 0) / sum(group.parameters for group in groups)
        raise NumpruneError(
            f"ratio {ratio} cannot be reached: with one unit kept in every layer at most {most:.3f} can go. Lower it."
        )
    above = int(torch.searchsorted(reached, budget).item())
    below = reached[above - 1].item() if above else 0
    # The unit that crosses the budget goes if that comes nearer to it.
    return above + 1 if reached[above].item() - budget < budget - below else above
