"""Budgets that are measured: what units cost in seconds per generated token, and the search that meets a latency."""

import copy
import math
import statistics
from collections.abc import Callable, Mapping
from decimal import ROUND_UP

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.architectures import KINDS, PrunableGroup, all_groups, decoder_blocks, prunable_groups
from numprune.budget import Budget, Costs, amount_over, readable
from numprune.errors import NumpruneError
from numprune.generation_benchmark import timed_generations
from numprune.plan import Choice
from numprune.slicing import slice_block

NEW_TOKENS = 64
# A pruned model that is faster than the budget by more than this share has lost more than it had to.
_TOLERANCE = 0.05
# Noise can make units look free or worse: every unit costs at least this share of an even share of the dense latency.
_LEAST_SHARE = 1e-6


def seconds_per_token(models: Mapping[str, PreTrainedModel], budget: Budget, repeats: int) -> dict[str, float]:
    """Measures models in turn: median seconds per generated token, the prompt's time included, by the model's name.

    Args:
        models: On the device to measure on.
        budget: Its batch and length are what is generated from.
        repeats: Generations of every model, at least 1; one more warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    generations = timed_generations(
        models, batch=budget.batch, prompt_length=budget.length, new_tokens=NEW_TOKENS, repeats=repeats
    )
    for name, timing in generations:
        seconds[name].append(timing.total / NEW_TOKENS)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measured_costs(model: PreTrainedModel, budget: Budget, *, repeats: int = 5) -> Costs:
    """A linear model of the latency: one cost per attention unit, one per MLP unit, the rest fixed.

    Measures the dense model beside a copy with half of all attention units and one with half of all MLP units; the
    three are in memory together.

    Args:
        model: A dense model on the device to measure on.
        budget: A latency.
        repeats: Generations of every model.

    Raises:
        ValueError: If the budget is no latency.
        NumpruneError: If the architecture is not supported.
    """
    _check_latency(budget)
    groups = all_groups(model)
    models = {"dense": model}
    for kind in KINDS:
        models[kind] = _sliced(model, {group.name: _units_without_half(group, kind) for group in groups})
    seconds = seconds_per_token(models, budget, repeats)
    dense = seconds["dense"]
    cost = {}
    for kind in KINDS:
        units = sum(group.units for group in groups if group.kind == kind)
        removed = sum(group.units // 2 for group in groups if group.kind == kind)
        cost[kind] = max((dense - seconds[kind]) / max(removed, 1), _LEAST_SHARE * dense / units)
    unit = {group.name: cost[group.kind] for group in groups}
    return Costs(dense - sum(group.units * unit[group.name] for group in groups), unit)


def meet_latency(
    model: PreTrainedModel,
    budget: Budget,
    choose: Callable[[Costs, float], Choice],
    *,
    least: Mapping[str, int] | None = None,
    attempts: int = 5,
    repeats: int = 5,
) -> Choice:
    """Finds units to keep with which the measured latency is within the budget, by at most 5 %.

    The measured cost of a unit holds near the dense model only. So the amount to remove is corrected by what the cut
    models measure: interpolated between the nearest ones on both sides of the budget.

    Args:
        model: A dense model on the device to measure on.
        budget: A latency.
        choose: Takes costs and the amount of predicted cost to remove, and says which units stay; more amount, fewer
            units.
        least: Units that every group keeps at least, by its name; by default one.
        attempts: Cut models to measure at most, at least 1.
        repeats: Generations of every measured model.

    Returns:
        What `choose` gave for the slowest measured model within the budget.

    Raises:
        ValueError: If the budget is no latency or `attempts` is below 1.
        NumpruneError: If the dense model is within the budget, if the least that may be kept is still too slow, or if
            no attempt met the budget.
    """
    _check_latency(budget)
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {attempts}")
    units = {group.name: group.units for group in all_groups(model)}
    kept_least = "the fewest units that may be kept" if least else "one unit in every group"
    least = least or dict.fromkeys(units, 1)
    smallest = _measure_sliced(model, {name: torch.arange(least[name]) for name in units}, budget, repeats)
    if smallest > budget.value:
        raise NumpruneError(
            f"{budget} cannot be met: with {kept_least} a token still takes "
            f"{readable(smallest, 'latency', ROUND_UP)} at batch {budget.batch} and prompts of {budget.length} tokens."
        )
    costs = measured_costs(model, budget, repeats=repeats)
    dense = costs.total(units)
    amount_over(dense, budget)
    # A hair less than all: rounding must not ask for more than can go.
    most = (1 - 1e-9) * (dense - costs.total(least))
    too_slow, fast_enough = (0.0, dense), (most, smallest)  # Pairs of the amount to remove and the seconds reached.
    best: tuple[float, Choice] | None = None
    for _ in range(attempts):
        amount = _interpolate(too_slow, fast_enough, (1 - _TOLERANCE / 2) * budget.value)
        choice = choose(costs, amount)
        reached = _measure_sliced(model, choice.kept, budget, repeats)
        if reached > budget.value:
            too_slow = (amount, reached)
            continue
        fast_enough = (amount, reached)
        if best is None or reached > best[0]:
            best = (reached, choice)
        if reached >= (1 - _TOLERANCE) * budget.value:
            break
    if best is None:
        raise NumpruneError(
            f"{budget} was not met in {attempts} attempts: the last took {readable(too_slow[1], 'latency')} per token. "
            "Allow more attempts or a higher latency."
        )
    return best[1]


def _check_latency(budget: Budget) -> None:
    if budget.kind != "latency":
        raise ValueError(f"budget must be of the kind latency, got {budget.kind}: see numprune.budget")


def _units_without_half(group: PrunableGroup, kind: str) -> Tensor:
    return torch.arange(math.ceil(group.units / 2) if group.kind == kind else group.units)


def _sliced(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> PreTrainedModel:
    smaller = copy.deepcopy(model)
    for block, groups in zip(decoder_blocks(smaller), prunable_groups(smaller), strict=True):
        slice_block(block, groups, kept)
    return smaller


def _measure_sliced(model: PreTrainedModel, kept: Mapping[str, Tensor], budget: Budget, repeats: int) -> float:
    return seconds_per_token({"pruned": _sliced(model, kept)}, budget, repeats)["pruned"]


def _interpolate(too_slow: tuple[float, float], fast_enough: tuple[float, float], seconds: float) -> float:
    """The amount at which a straight line through both points reaches `seconds`, no further than `fast_enough`."""
    share = min((too_slow[1] - seconds) / (too_slow[1] - fast_enough[1]), 1.0)
    return too_slow[0] + share * (fast_enough[0] - too_slow[0])
