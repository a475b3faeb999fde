"""What the stages have left of one model and budget, read for its page."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from numprune.allocation import Shapes, unit_prices
from numprune.architectures import all_groups
from numprune.budget import linear_costs, parse_budget
from numprune.checkpoint import load_shapes
from numprune.plan import PruningPlan
from numprune.ranking import Ranking, load_rankings
from numprune.recipe import Recipe
from numprune.stock import within_stock
from tasks.layout import (
    benchmark_file,
    comparison_file,
    evaluation_file,
    model_folder,
    plan_file,
    scores_file,
    timing_file,
)
from tasks.parameters import Workload


@dataclass(frozen=True)
class Results:
    """One run.

    Attributes:
        model: Name of the dense model.
        budget: As in `params.yaml`.
        plan: What stays.
        dense: Evaluation of the dense model.
        pruned: Evaluation of the pruned one.
        benchmark: Cost of both.
        comparison: Hidden states and generated text of both.
        timing: How long the evaluation took, and when it was done.
        rankings: By the group's name; empty where the recipe ranks once the budget is known.
        prices: Of the units in the order in which they go, by the group's name; empty where the threshold is none on
            them.
    """

    model: str
    budget: str
    plan: PruningPlan
    dense: dict[str, Any]
    pruned: dict[str, Any]
    benchmark: dict[str, Any]
    comparison: dict[str, Any]
    timing: dict[str, Any]
    rankings: dict[str, Ranking]
    prices: dict[str, Tensor]

    @property
    def name(self) -> str:
        """Of files: model and budget."""
        return f"{self.model}-{self.budget}"

    @property
    def recipe(self) -> Recipe:
        """The recipe behind the plan."""
        settings = dict(self.plan.recipe)
        shapes, penalty = Shapes(**settings.pop("shapes")), float(settings.pop("penalty"))
        return Recipe(shapes=shapes, penalty=penalty, **settings)

    @property
    def documents(self) -> dict[str, dict[str, Any]]:
        """What `tasks.registry.figures.metrics` takes."""
        return {
            "plan.json": {"achieved_ratio": self.plan.achieved_ratio},
            "evaluation.json": self.pruned,
            "benchmark.json": self.benchmark,
            "dense/evaluation.json": self.dense,
        }

    @property
    def perplexity_ratio(self) -> float:
        """Pruned over dense."""
        return float(self.pruned["perplexity"] / self.dense["perplexity"])

    @property
    def speed_up(self) -> float:
        """Of greedy generation."""
        return float(self.benchmark["ratios"]["speed_up"])


def read_results(model: str, budget: str, workload: Workload) -> Results:
    """Reads the files of one run.

    Args:
        model: Name of the dense model.
        budget: As in `params.yaml`.
        workload: What the budget was counted for.
    """
    plan, rankings = PruningPlan.load(plan_file(model, budget)), load_rankings(scores_file(model))
    results = Results(
        model=model,
        budget=budget,
        plan=plan,
        dense=_read(evaluation_file(model, None)),
        pruned=_read(evaluation_file(model, budget)),
        benchmark=_read(benchmark_file(model, budget)),
        comparison=_read(comparison_file(model, budget)),
        timing=_read(timing_file(model, budget)),
        rankings=rankings,
        prices={},
    )
    prices = _prices(results, workload) if rankings else {}
    return Results(**vars(results) | {"prices": prices})


def _prices(results: Results, workload: Workload) -> dict[str, Tensor]:
    recipe = results.recipe
    wanted = parse_budget(results.budget, batch=workload.batch, length=workload.length)
    # The paper's Eq. 8 has no price per unit; after several cuts, and for a measured latency, prices were others.
    if recipe.allocation == "literal" or recipe.steps > 1 or wanted.kind == "latency":
        return {}
    shapes = load_shapes(model_folder(results.model))
    return unit_prices(
        all_groups(shapes),
        results.rankings,
        allocation=recipe.allocation,
        costs=linear_costs(shapes, wanted).unit,
        shapes=within_stock(recipe.shapes, shapes),
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
