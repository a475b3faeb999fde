"""What is known of a pruned checkpoint at the moment it is registered."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Build:
    """One checkpoint that is about to become a version.

    Attributes:
        model: Name of the source model, as in `params.yaml`.
        budget: What the pruned model may cost, as in `params.yaml`.
        recipe: Name of the recipe.
        metric_files: `plan.json`, `evaluation.json`, `benchmark.json` and `dense/evaluation.json` by these names.
        run_id: Of the MLflow run that holds the metrics.
        orchestrator: What ran the stages, such as `{"prefect_flow_run": "..."}`; empty if nothing did.
        tags: Of the version in MLflow, except `statement_hash`, which cannot be known before the statement is.
    """

    model: str
    budget: str
    recipe: str
    metric_files: Mapping[str, Path]
    run_id: str
    orchestrator: Mapping[str, str]
    tags: Mapping[str, str]
