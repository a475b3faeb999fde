"""Publish a pruned checkpoint in MLflow: one run and one registered version for each content.

The pipeline's stages never write to MLflow, because a stage whose results come from the cache would log nothing. This
step reads what they left (`dvc.lock`, the plan, the metric files), adds what proves the checkpoint and what serves it,
and can be repeated at any time: it finds what is already there. A crash leaves a run that is not finished, and the next
call completes it.
"""

import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from numprune.budget import parse_budget
from numprune.errors import NumpruneError
from numprune.recipe import recipe_name
from tasks.dvc_lock import LockedStage, read_lock, stages_behind, version_outputs
from tasks.layout import (
    benchmark_file,
    calibration_file,
    checkpoint_folder,
    evaluation_file,
    model_folder,
    plan_file,
    plots_folder,
    report_page,
    timing_file,
)
from tasks.parameters import PARAMETERS_FILE, Registry, Signing, load_parameters
from tasks.provenance.build import Build
from tasks.provenance.evidence import write_evidence
from tasks.provenance.lineage import draw_lineage, folder_lineage
from tasks.registry.connection import connect
from tasks.registry.figures import figure_tags, metrics
from tasks.registry.version_folder import assemble, local_path, stored_folder
from tasks.step import run_step

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

LOCK_FILE = Path("dvc.lock")
CANDIDATE = "candidate"

# The tag by which MLflow's page shows a run below another.
PARENT_RUN = "mlflow.parentRunId"


@dataclass(frozen=True)
class Release:
    """A pruned checkpoint and what identifies it; hashes are DVC's."""

    model: str
    budget: str
    recipe: str
    source: str
    """The model's repository or folder."""
    revision: str
    """Of the source; none if it was not fetched."""
    checkpoint: Path
    checkpoint_hash: str
    source_hash: str
    calibration_hash: str
    plan_hash: str
    metric_files: Mapping[str, Path]
    """By the name they have in MLflow."""
    report_files: Mapping[str, Path]
    """The page of the run, its plots and their data, likewise; left out if the page is of other results."""
    evidence_hash: str
    """Of the checkpoint and of every metric file: what one run documents."""

    @property
    def tags(self) -> dict[str, str]:
        """What a registered version says of its origin."""
        return {
            "model": self.model,
            "budget": self.budget,
            "recipe": self.recipe,
            "source": self.source,
            "revision": self.revision,
            "content_hash": self.checkpoint_hash,
            "source_hash": self.source_hash,
            "calibration_hash": self.calibration_hash,
            "plan_hash": self.plan_hash,
        }

    @property
    def documents(self) -> dict[str, Any]:
        """The contents of the metric files."""
        return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in self.metric_files.items()}


@dataclass(frozen=True)
class Publication:
    """A version in the model registry."""

    model: str
    budget: str
    version: int
    is_new: bool
    """Whether this call wrote anything."""


def publish(model: str, budget: str, *, orchestrator: Mapping[str, str] | None = None) -> Publication:
    """Logs and registers the checkpoint of one model and budget, unless that is done already.

    Args:
        model: Name of the source model.
        budget: One of params.yaml.
        orchestrator: What ran the stages, such as `{"prefect_flow_run": "..."}`, for the record.

    Raises:
        NumpruneError: If a stage it needs has not run, or a file is not the one in dvc.lock.
    """
    release = read_release(model, budget)
    parameters = load_parameters()
    registry = parameters.registry
    client = connect(registry)
    experiment = open_experiment(client, registry)
    run = find_run(client, experiment, release)
    version = _find_version(client, release)
    if version is not None and _is_finished(run):
        _point_alias(client, budget_alias(budget), version)
        return Publication(model, budget, int(version.version), is_new=False)
    run = run or create_run(client, experiment, release)
    log_run(client, run, release)
    if version is None:
        version = _register(
            client, experiment, run, release, orchestrator=orchestrator or {}, signing=parameters.signing
        )
    client.set_model_version_tag(model, version.version, "evaluation_run", run.info.run_id)
    _point_alias(client, budget_alias(budget), version)
    _point_alias(client, CANDIDATE, version)
    # Last of all: a finished run means that everything above is there.
    client.set_terminated(run.info.run_id)
    return Publication(model, budget, int(version.version), is_new=True)


def find_publication(model: str, budget: str) -> Publication | None:
    """The version that `publish` would find, if it would have nothing to write; otherwise None."""
    from mlflow.exceptions import MlflowException

    registry = load_parameters().registry
    with contextlib.suppress(NumpruneError, MlflowException):  # `publish` says what is wrong.
        release = read_release(model, budget)
        client = connect(registry)
        finished = _is_finished(find_run(client, open_experiment(client, registry), release))
        version = _find_version(client, release)
        if finished and version is not None and _points_to(client, budget_alias(budget), version):
            return Publication(model, budget, int(version.version), is_new=False)
    return None


def _is_finished(run: "Run | None") -> bool:
    return run is not None and run.info.status == "FINISHED"


def budget_alias(budget: str) -> str:
    """The alias of the current version at a budget: `ratio-0_2` for 0.2, since MLflow allows no dot."""
    kind = parse_budget(budget).kind
    return (f"ratio-{budget}" if kind == "ratio" else budget).replace(".", "_")


def read_release(model: str, budget: str) -> Release:
    """Reads from `dvc.lock` what identifies a checkpoint, and checks that the small files are the ones it names.

    Raises:
        NumpruneError: If a stage it needs has not run, or a file is not the one in dvc.lock.
    """
    stages = _stages_behind(model, budget)
    hashes = {Path(path): md5 for s in stages.values() for path, md5 in (*s.dependencies.items(), *s.outputs.items())}
    metric_files = {
        "evaluation.json": evaluation_file(model, budget),
        "benchmark.json": benchmark_file(model, budget),
        "dense/evaluation.json": evaluation_file(model, None),
    }
    plan = plan_file(model, budget)
    for path in (plan, *metric_files.values()):
        if not path.exists() or hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != hashes.get(path):
            raise NumpruneError(f"{path} is missing or not the file that {LOCK_FILE} names: run `dvc repro` first.")
    checkpoint, source, calibration = checkpoint_folder(model, budget), model_folder(model), calibration_file(model)
    for path in (checkpoint, source, calibration):
        if path not in hashes or not path.exists():
            raise NumpruneError(f"{path} is missing or not in {LOCK_FILE}: run `dvc repro` first.")
    origin, revision = _origin(stages, model)
    evidence = [hashes[path] for path in (checkpoint, plan, *metric_files.values())]
    return Release(
        model=model,
        budget=budget,
        recipe=recipe_name(load_parameters().recipe.resolve()),
        source=origin,
        revision=revision,
        checkpoint=checkpoint,
        checkpoint_hash=hashes[checkpoint],
        source_hash=hashes[source],
        calibration_hash=hashes[calibration],
        plan_hash=hashes[plan],
        metric_files={"plan.json": plan, **metric_files},
        report_files=_report_files(model, budget, [hashes[path] for path in (plan, *metric_files.values())]),
        evidence_hash=hashlib.sha256(" ".join(evidence).encode()).hexdigest(),
    )


def _report_files(model: str, budget: str, hashes: Sequence[str]) -> dict[str, Path]:
    """The page of a run and its plots, if the page names these hashes: one of earlier results is no page of them.

    And how long the evaluation took, which is no evidence of anything.
    """
    timing = timing_file(model, budget)
    timings = {"timing.json": timing} if timing.exists() else {}
    page = report_page(model, budget)
    if not page.exists() or not all(md5 in page.read_text(encoding="utf-8") for md5 in hashes):
        return timings
    plots = sorted(plots_folder(model, budget).iterdir())
    return {**timings, "report.html": page, **{f"plots/{path.name}": path for path in plots}}


def _stages_behind(model: str, budget: str) -> dict[str, LockedStage]:
    """Those of this version alone: `dvc.lock` keeps stages of budgets that are no longer asked for, as they were."""
    try:
        stages = read_lock(LOCK_FILE.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NumpruneError(f"{LOCK_FILE} not found in {Path.cwd()}: run `dvc repro` first.") from None
    return stages_behind(stages, version_outputs(model, budget))


def _origin(stages: Mapping[str, LockedStage], model: str) -> tuple[str, str]:
    """Source and revision of a model as they were when it was fetched, whatever params.yaml says since."""
    name = f"download@{model}"
    download = stages[name].parameters.get(f"downloads.{model}") if name in stages else None
    if download is None:
        return model_folder(model).as_posix(), "none"
    return str(download.get("repository") or download.get("folder")), str(download["revision"])


def open_experiment(client: "MlflowClient", registry: Registry) -> "Experiment":
    """The experiment of `params.yaml`, created if it is not there.

    Raises:
        NumpruneError: If it was deleted.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(registry.experiment)
    if experiment is None:
        with contextlib.suppress(MlflowException):  # Another process was faster.
            client.create_experiment(registry.experiment, artifact_location=_artifact_location(registry))
        experiment = client.get_experiment_by_name(registry.experiment)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise NumpruneError(
            f"The MLflow experiment {registry.experiment!r} was deleted: restore it (`mlflow experiments restore`) or "
            "name another in registry.experiment."
        )
    return experiment


def _artifact_location(registry: Registry) -> str | None:
    if urlsplit(registry.artifacts).scheme:
        return registry.artifacts
    if urlsplit(registry.tracking_uri).scheme in {"http", "https"}:
        return None  # A server keeps its files where it was told to, not in a folder of this machine.
    return Path(registry.artifacts).resolve().as_uri()


def find_run(
    client: "MlflowClient", experiment: "Experiment", release: Release, *, parent: str | None = None
) -> "Run | None":
    """The run that documents a release: a child of the run of a sweep, or one of its own."""
    runs = client.search_runs(
        [experiment.experiment_id],
        f"tags.evidence_hash = '{release.evidence_hash}' and tags.model = '{release.model}'",
        order_by=["attributes.start_time ASC"],
    )
    return next((run for run in runs if run.data.tags.get(PARENT_RUN) == parent), None)


def create_run(
    client: "MlflowClient",
    experiment: "Experiment",
    release: Release,
    *,
    parent: str | None = None,
    source: Mapping[str, str] | None = None,
) -> "Run":
    """Opens the run that documents a release.

    Args:
        client: Of the registry.
        experiment: To put it into.
        release: What it documents.
        parent: The run of the sweep that it is part of.
        source: The state of the code, as `git_state` gives it; by default that of the working directory.
    """
    tags = {**release.tags, **(source or git_state()), "evidence_hash": release.evidence_hash}
    tags |= {PARENT_RUN: parent} if parent else {}
    return client.create_run(experiment.experiment_id, tags=tags, run_name=f"{release.model}-{release.budget}")


def log_run(client: "MlflowClient", run: "Run", release: Release) -> None:
    """Logs metrics, parameters and files of a release; again after a crash, it is the same."""
    from mlflow.entities import Metric, Param

    # The time of the run's start, not of this call: logged again after a crash, a metric is the same point.
    time = run.info.start_time
    points = [Metric(name, value, time, step=0) for name, value in metrics(release.documents).items()]
    params = [Param(name, str(value)) for name, value in run_parameters()]
    client.log_batch(run.info.run_id, metrics=points, params=params)
    files = {**release.metric_files, **release.report_files, "params.yaml": PARAMETERS_FILE, "dvc.lock": LOCK_FILE}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            named = Path(folder) / name
            named.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, named)  # Without the protection that DVC gives files of its cache.
        client.log_artifacts(run.info.run_id, folder)


def run_parameters() -> Iterator[tuple[str, Any]]:
    """What of `params.yaml` a run shows."""
    sections = load_parameters().model_dump(mode="json", include={"calibration", "recipe", "evaluation", "benchmark"})
    for section, values in sections.items():
        yield from ((f"{section}.{name}", value) for name, value in values.items())


def _find_version(client: "MlflowClient", release: Release) -> "ModelVersion | None":
    versions = client.search_model_versions(
        f"name = '{release.model}' and tags.content_hash = '{release.checkpoint_hash}'"
    )
    # Two budgets can give the same checkpoint; each has a version of its own, because each has an alias.
    return next((version for version in versions if version.tags.get("budget") == release.budget), None)


def _register(
    client: "MlflowClient",
    experiment: "Experiment",
    run: "Run",
    release: Release,
    *,
    orchestrator: Mapping[str, str],
    signing: Signing,
) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    model = _log_model(client, experiment, run, release, orchestrator=orchestrator, signing=signing)
    try:
        client.create_registered_model(release.model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        release.model,
        source=f"models:/{model.model_id}",
        run_id=run.info.run_id,
        model_id=model.model_id,
        # Those of its files' statement, which may be from a call before a crash and another commit.
        tags={name: value for name, value in model.tags.items() if not name.startswith("mlflow.")},
        description=f"{release.model}, pruned to the budget {release.budget}.",
    )


def _log_model(
    client: "MlflowClient",
    experiment: "Experiment",
    run: "Run",
    release: Release,
    *,
    orchestrator: Mapping[str, str],
    signing: Signing,
) -> "LoggedModel":
    """Puts the version's folder into MLflow's files, unless a call before this one has done that."""
    found = client.search_logged_models(
        [experiment.experiment_id],
        f"tags.content_hash = '{release.checkpoint_hash}' and tags.budget = '{release.budget}'",
    )
    for model in found:
        if str(model.status) != "READY":
            _delete_unfinished(client, model)
        elif model.source_run_id == run.info.run_id:
            return model
    tags = {**release.tags, **figure_tags(release.documents), **git_state()}
    name = re.sub(r"[^\w-]", "-", f"{release.model}-{release.budget}")  # MLflow allows no dots here.
    model = client.create_logged_model(
        experiment.experiment_id,
        name=name,
        source_run_id=run.info.run_id,
        tags=tags,
        params={"budget": release.budget, "recipe": release.recipe},
        model_type="pruned-transformer",
    )
    with stored_folder(client, model, name) as folder:
        assemble(folder, release.checkpoint, model_id=model.model_id, run_id=run.info.run_id)
        build = Build(
            model=release.model,
            budget=release.budget,
            recipe=release.recipe,
            metric_files=release.metric_files,
            run_id=run.info.run_id,
            orchestrator=orchestrator,
            tags=tags,
        )
        statement_hash = write_evidence(folder, build, signing)
        _log_picture(client, run, folder)
    client.set_logged_model_tags(model.model_id, {"statement_hash": statement_hash})
    return client.finalize_logged_model(model.model_id, "READY")


def _log_picture(client: "MlflowClient", run: "Run", folder: Path) -> None:
    """Shows on the run's page where the version comes from."""
    with tempfile.TemporaryDirectory() as temporary:
        picture = Path(temporary) / "lineage.svg"
        draw_lineage(folder_lineage(folder), picture)
        client.log_artifact(run.info.run_id, str(picture))


def _delete_unfinished(client: "MlflowClient", model: "LoggedModel") -> None:
    """Deletes what a crash left; writing anew is safer than going on with files of unknown state."""
    client.delete_logged_model(model.model_id)
    place = local_path(model.artifact_location)
    if place is not None and place.parent.name == model.model_id:
        # MLflow keeps the files of deleted models until `mlflow gc`; nothing refers to these.
        shutil.rmtree(place.parent, ignore_errors=True)


def _point_alias(client: "MlflowClient", alias: str, version: "ModelVersion") -> None:
    if not _points_to(client, alias, version):
        client.set_registered_model_alias(version.name, alias, str(version.version))


def _points_to(client: "MlflowClient", alias: str, version: "ModelVersion") -> bool:
    return str(client.get_registered_model(version.name).aliases.get(alias)) == str(version.version)


def git_state() -> dict[str, str]:
    """The commit of the working directory, and whether its code was changed since."""
    # From the top: git ignores the folder that a demo runs in. dvc.lock changes with every run; it is logged itself.
    changed = ["git", "status", "--porcelain", "--", ":(top)", f":(top,exclude){LOCK_FILE}"]
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(changed, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": "none", "git_dirty": "unknown"}
    return {"git_commit": commit, "git_dirty": str(bool(changes.strip())).lower()}


def _publish_and_say(model: str, budget: str) -> None:
    publication = publish(model, budget)
    state = "registered" if publication.is_new else "unchanged"
    print(f"{publication.model} version {publication.version} (budget {publication.budget}): {state}")


if __name__ == "__main__":
    run_step(_publish_and_say)
