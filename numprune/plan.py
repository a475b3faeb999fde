"""The pruning plan: what stays in every layer and why, as a JSON file that a person can read and diff."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numprune.architectures import PrunableGroup
from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from numprune.recipe import Recipe

FORMAT = 2


@dataclass(frozen=True)
class Source:
    """Where a plan comes from.

    Attributes:
        model: Name, path or Hub id of the dense model.
        revision: Its commit on the Hub, if known.
        fingerprint: SHA-256 of its configuration and weights.
        calibration: SHA-256 of the calibration tokens.
    """

    model: str
    revision: str | None
    fingerprint: str
    calibration: str


@dataclass(frozen=True)
class Choice:
    """Which units stay, and the scores behind it.

    Attributes:
        kept: Ascending indices of the units that stay, by the group's name.
        lowest_kept: Lowest score of a unit that stays; None if none stays.
        highest_removed: Highest score of a unit that goes; None if none goes.
        threshold: The highest price that was paid, see `numprune.allocation`.
    """

    kept: Mapping[str, Tensor]
    lowest_kept: Mapping[str, float | None]
    highest_removed: Mapping[str, float | None]
    threshold: float


@dataclass(frozen=True)
class GroupPlan:
    """What stays of one prunable group.

    Attributes:
        units: Units of the dense group.
        kept: Ascending indices of the units that stay; if there are none, the whole module goes.
        unit_parameters: Parameters that go with one unit.
        lowest_kept: Lowest score of a unit that stays; None if none stays.
        highest_removed: Highest score of a unit that goes; None if none goes.
    """

    units: int
    kept: tuple[int, ...]
    unit_parameters: int
    lowest_kept: float | None
    highest_removed: float | None


@dataclass(frozen=True)
class PruningPlan:
    """Which units of a model stay.

    Attributes:
        source: Where the plan comes from.
        recipe: The settings behind it.
        budget: What was asked for, as `numprune.budget` writes it: 0.2 for a share of the units' parameters.
        threshold: The highest price that was paid, see `numprune.allocation`.
        groups: By the group's name.
    """

    source: Source
    recipe: Mapping[str, Any]
    budget: str
    threshold: float
    groups: Mapping[str, GroupPlan]

    @property
    def dense_parameters(self) -> int:
        """Parameters of all units of the dense model."""
        return sum(group.units * group.unit_parameters for group in self.groups.values())

    @property
    def kept_parameters(self) -> int:
        """Parameters of the units that stay."""
        return sum(len(group.kept) * group.unit_parameters for group in self.groups.values())

    @property
    def achieved_ratio(self) -> float:
        """Share of the units' parameters that goes."""
        return 1 - self.kept_parameters / self.dense_parameters

    def kept(self, name: str) -> Tensor:
        """Indices of the kept units of a group."""
        return torch.tensor(self.groups[name].kept, dtype=torch.long)

    def check_fits(self, groups: Iterable[PrunableGroup]) -> None:
        """Raises NumpruneError if the plan was made for a model of another shape."""
        expected = {name: (group.units, group.unit_parameters) for name, group in self.groups.items()}
        found = {group.name: (group.units, group.unit_parameters) for group in groups}
        if expected != found:
            raise NumpruneError(f"The plan was made for {self.source.model}; this model has other groups: plan anew.")

    def save(self, path: Path) -> None:
        """Writes the plan as JSON."""
        content = {
            "format": FORMAT,
            "source": asdict(self.source),
            "recipe": {key: str(value) if value == math.inf else value for key, value in self.recipe.items()},
            "budget": self.budget,
            "achieved_ratio": self.achieved_ratio,
            "parameters": {"dense": self.dense_parameters, "pruned": self.kept_parameters},
            "threshold": self.threshold,
            "groups": {
                name: {
                    "units": group.units,
                    "kept_units": len(group.kept),
                    "kept": to_ranges(group.kept),
                    "unit_parameters": group.unit_parameters,
                    "lowest_kept": group.lowest_kept,
                    "highest_removed": group.highest_removed,
                }
                for name, group in self.groups.items()
            },
        }
        with replace_on_success(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "PruningPlan":
        """Reads a plan.

        Raises:
            NumpruneError: If the file is missing or no plan.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise NumpruneError(f"{path} has plan format {content['format']}; this version reads {FORMAT}.")
            groups = {
                name: GroupPlan(
                    units=group["units"],
                    kept=_from_ranges(group["kept"], group["units"]),
                    unit_parameters=group["unit_parameters"],
                    lowest_kept=group["lowest_kept"],
                    highest_removed=group["highest_removed"],
                )
                for name, group in content["groups"].items()
            }
            return cls(
                source=Source(**content["source"]),
                recipe=content["recipe"],
                budget=content["budget"],
                threshold=content["threshold"],
                groups=groups,
            )
        except FileNotFoundError:
            raise NumpruneError(f"{path} not found.") from None
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise NumpruneError(f"{path} is no pruning plan: {error!r}") from None


def make_plan(
    groups: Sequence[PrunableGroup], choice: Choice, budget: str, *, source: Source, recipe: Recipe
) -> PruningPlan:
    """The plan that a choice of units makes.

    Args:
        groups: All prunable groups of the dense model.
        choice: What stays.
        budget: What was asked for, as `numprune.budget` writes it.
        source: Where model and calibration come from.
        recipe: How units were chosen.
    """
    planned = {
        group.name: GroupPlan(
            units=group.units,
            kept=tuple(choice.kept[group.name].tolist()),
            unit_parameters=group.unit_parameters,
            lowest_kept=choice.lowest_kept[group.name],
            highest_removed=choice.highest_removed[group.name],
        )
        for group in groups
    }
    return PruningPlan(source=source, recipe=asdict(recipe), budget=budget, threshold=choice.threshold, groups=planned)


def to_ranges(indices: Sequence[int]) -> str:
    """Ascending indices as text: 0-5,7,9-12."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _from_ranges(text: str, units: int) -> tuple[int, ...]:
    indices: list[int] = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        indices.extend(range(int(first), int(last or first) + 1))
    if indices != sorted(set(indices)) or (text and not indices) or max(indices, default=-1) >= units:
        raise ValueError(f"kept units must ascend within [0, {units}), got {text!r}")
    return tuple(indices)
