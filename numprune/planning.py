"""From a budget in the user's terms to the units that stay."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from transformers import PreTrainedModel

from numprune.allocation import Shapes
from numprune.architectures import all_groups, decoder_blocks, linear
from numprune.budget import Budget, Costs, to_remove
from numprune.choice import choose_units
from numprune.errors import NumpruneError
from numprune.latency import meet_latency
from numprune.plan import Choice
from numprune.progress import Watch, silent
from numprune.ranking import Ranking
from numprune.recipe import Recipe
from numprune.slicing import add_bias
from numprune.statistics import Measured
from numprune.stock import within_stock


def choose_within(
    budget: Budget,
    model: PreTrainedModel,
    stored: PreTrainedModel,
    recipe: Recipe,
    measured: Measured,
    *,
    rankings: Mapping[str, Ranking] | None = None,
    watch: Watch = silent,
) -> Choice:
    """Decides which units of a dense model stay so that it meets a budget.

    Args:
        budget: What the pruned model may cost.
        model: The dense model; only its shapes matter if rankings are given and the recipe has one step.
        stored: The same model in its checkpoint's data type; its shapes, or for a latency the model on its device.
        recipe: How to decide.
        measured: Of the dense model.
        rankings: Of the dense model if they are there already.
        watch: Shows the progress of the steps.

    Raises:
        NumpruneError: If the budget cannot be met, or is met by the dense model.
    """
    if recipe.allocation == "literal" and budget.kind != "ratio":
        raise NumpruneError(f"The allocation literal knows ratios alone, got the budget {budget}: choose another.")
    if recipe.allocation == "literal" and recipe.shapes != Shapes():
        raise NumpruneError("The allocation literal knows no shapes: leave them out or choose another allocation.")

    def choose(costs: Costs, amount: float) -> Choice:
        return choose_units(model, recipe, costs, amount, measured, rankings=rankings, watch=watch)

    if budget.kind != "latency":
        if recipe.recovery == "bias":
            stored = with_biases(stored)
        return choose(*to_remove(stored, budget, minimum=0 if recipe.shapes.depth else 1))
    groups = all_groups(model)
    shapes = within_stock(recipe.shapes, model)
    least = {group.name: group.units - shapes.removable(group)[-1] for group in groups}
    return meet_latency(stored, budget, choose, least=least)


def with_biases(stored: PreTrainedModel) -> PreTrainedModel:
    """The shapes of a model whose consumers all have a bias, as those of the pruned one are going to."""
    stored = deepcopy(stored)
    for group in all_groups(stored):
        consumer = linear(decoder_blocks(stored)[group.block], group.consumer)
        add_bias(consumer, torch.zeros(consumer.out_features, device=consumer.weight.device))
    return stored
