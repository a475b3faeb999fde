"""Recipes: how units are ranked, how many of them every layer loses, and how what stays makes up for them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from numprune.allocation import Allocation, Shapes
from numprune.ranking import Selection
from numprune.recovery import Recovery
from numprune.statistics import Damping


@dataclass(frozen=True)
class Recipe:
    """The choices behind a pruned model, the paper's by default; any selection, allocation and recovery go together.

    Attributes:
        selection: In which order the units of a layer go, see `numprune.ranking.rank`.
        allocation: How many go from every layer, see `numprune.allocation`.
        recovery: How the kept weights make up for the pruned ones, see `numprune.cutting.cut`.
        steps: In how many cuts the budget is reached; after each the model is recovered and ranked anew.
        planning_tokens: Calibration tokens that loss rises are measured on, see `numprune.sensitivity`: of the first
            sequences that together have no more, at least of one.
        shapes: Which widths layers may have.
        penalty: Lambda of the numerical score.
        damping: Of matrices of calibration moments, relative to the mean diagonal; `auto` takes it from the spectrum.
        seed: Of the selection `random`.
    """

    selection: Selection = "newton"
    allocation: Allocation = "global"
    recovery: Recovery = "least_squares"
    steps: int = 1
    planning_tokens: int = 4096
    shapes: Shapes = field(default_factory=Shapes)
    penalty: float = math.inf
    damping: Damping = 1e-6
    seed: int = 0


RECIPES: Mapping[str, Recipe] = {
    "paper": Recipe(),
    "best": Recipe(selection="obs", allocation="loss_aware", recovery="refit", damping="auto"),
}


def recipe_name(recipe: Recipe) -> str:
    """The name of a preset, or `custom`."""
    return next((name for name, preset in RECIPES.items() if preset == recipe), "custom")
