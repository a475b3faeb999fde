"""Record a sweep in MLflow: a run with its table, pages and plots, and a child run for every model and budget.

Nothing is registered: a budget becomes a version when `params.yaml` asks for it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.layout import REPORT
from tasks.parameters import PARAMETERS_FILE, Parameters
from tasks.publish import (
    LOCK_FILE,
    Release,
    create_run,
    find_run,
    log_run,
    open_experiment,
    read_release,
    run_parameters,
)
from tasks.registry.connection import connect
from tasks.registry.figures import metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric, Run

# Of the sweep's own run: what its plots on MLflow's page show against the share removed.
_CURVES = ("perplexity", "perplexity_ratio", "bits_per_byte", "speed_up", "peak_memory_bytes", "checkpoint_bytes")


@dataclass(frozen=True)
class SweepRecord:
    """The run of a sweep in MLflow."""

    run_id: str
    children: int
    is_new: bool
    """Whether this call wrote anything."""


def record_sweep(parameters: Parameters, source: Mapping[str, str]) -> SweepRecord:
    """Logs all models and budgets of the working directory as one sweep, unless that is done already.

    The results identify a sweep: the same ones are found again, and a run that a crash left open is completed.

    Args:
        parameters: Of the working directory.
        source: The state of the code, as `tasks.publish.git_state` gives it.

    Raises:
        NumpruneError: If a stage has not run, or a file is not the one in dvc.lock.
    """
    releases = [read_release(model, budget) for model in parameters.models for budget in parameters.budgets]
    client = connect(parameters.registry)
    experiment = open_experiment(client, parameters.registry)
    evidence = hashlib.sha256(" ".join(sorted(release.evidence_hash for release in releases)).encode()).hexdigest()
    run = _find_sweep(client, experiment, evidence)
    if run is not None and run.info.status == "FINISHED":
        return SweepRecord(run.info.run_id, len(releases), is_new=False)
    run = run or client.create_run(
        experiment.experiment_id,
        tags={**source, "sweep_hash": evidence, "models": ", ".join(parameters.models)},
        run_name=f"sweep of {', '.join(parameters.models)}",
    )
    for release in releases:
        _log_child(client, experiment, run, release, source)
    _log_sweep(client, run, releases, parameters)
    # Last of all: a finished run means that everything above is there.
    client.set_terminated(run.info.run_id)
    return SweepRecord(run.info.run_id, len(releases), is_new=True)


def _find_sweep(client: "MlflowClient", experiment: "Experiment", evidence: str) -> "Run | None":
    found = client.search_runs(
        [experiment.experiment_id],
        f"tags.sweep_hash = '{evidence}'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    return found[0] if found else None


def _log_child(
    client: "MlflowClient", experiment: "Experiment", sweep: "Run", release: Release, source: Mapping[str, str]
) -> None:
    run = find_run(client, experiment, release, parent=sweep.info.run_id)
    if run is not None and run.info.status == "FINISHED":
        return
    run = run or create_run(client, experiment, release, parent=sweep.info.run_id, source=source)
    log_run(client, run, release)
    client.set_terminated(run.info.run_id)


def _log_sweep(client: "MlflowClient", run: "Run", releases: Sequence[Release], parameters: Parameters) -> None:
    from mlflow.entities import Param

    asked = [("models", parameters.models), ("budgets", parameters.budgets), *run_parameters()]
    client.log_batch(
        run.info.run_id,
        metrics=list(_curves(run, releases)),
        params=[Param(name, str(value)) for name, value in asked],
    )
    client.log_artifacts(run.info.run_id, str(REPORT), "report")
    for path in (Path(PARAMETERS_FILE), LOCK_FILE):
        client.log_artifact(run.info.run_id, str(path))


def _curves(run: "Run", releases: Sequence[Release]) -> Iterator["Metric"]:
    """Figures of every model over the share removed in per mille, which MLflow takes for steps."""
    from mlflow.entities import Metric

    for release in releases:
        found = metrics(release.documents)
        step = round(1000 * found["achieved_ratio"])
        for name in _CURVES:
            if name in found:
                yield Metric(f"{release.model}/{name}", found[name], run.info.start_time, step)
