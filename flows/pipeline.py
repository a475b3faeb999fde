"""The Prefect flows that run the stages of `dvc.yaml`: a task for each of them, in the order of its graph.

DVC decides what has to run and keeps the results; Prefect decides when, tries again, stops and shows.
"""

import contextlib
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from flows.environment import prepare_environment

prepare_environment()

from prefect import flow, get_run_logger, task  # noqa: E402
from prefect.artifacts import create_table_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError  # noqa: E402
from prefect.concurrency.sync import concurrency  # noqa: E402
from prefect.futures import PrefectFuture  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Cancelled, Completed, Failed  # noqa: E402

from flows import subprocess_group  # noqa: E402
from flows.checks import check_inputs  # noqa: E402
from flows.fanout import stage_runner  # noqa: E402
from flows.progress import StageProgress  # noqa: E402
from flows.stages import (  # noqa: E402
    Ending,
    Outcome,
    Progress,
    is_unchanged,
    run_stage,
    side_by_side,
    stage_environment,
    stage_graph,
)
from flows.table import Column, Report, print_table  # noqa: E402
from numprune.errors import NumpruneError  # noqa: E402
from tasks.parameters import Parameters, load_parameters  # noqa: E402
from tasks.publish import Publication, publish  # noqa: E402
from tasks.summary import Row, all_rows  # noqa: E402

# The stages that run a model, on an accelerator if there is one.
ACCELERATED = {"capture", "score", "prune", "compensate", "evaluate_dense", "evaluate", "benchmark"}


def _is_worth_another_try(_task: Any, _run: Any, state: State[Any]) -> bool:
    return state.name == Ending.FAILED.value


@task(
    name="stage",
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=_is_worth_another_try,
    retry_delay_seconds=2,
)
def reproduce(
    *,
    stage: str,
    root: Path,
    environment: Mapping[str, str],
    owner: str,
    timeout_hours: float,
    accelerator_limit: str | None,
) -> State[None]:
    """Brings one stage up to date; its state is named after how it ended, and says where it ran.

    Args:
        stage: Its name, as in `evaluate@reference-llama-0.2`.
        root: The folder of `dvc.yaml`.
        environment: Variables of its process, see `flows.stages.stage_environment`.
        owner: Of its process, see `flows.subprocess_group`.
        timeout_hours: After which it is stopped.
        accelerator_limit: Name of the Prefect concurrency limit of which a stage that runs a model takes one slot.
    """
    if is_unchanged(root, stage):
        return Completed(name=Ending.UNCHANGED.value)
    logger = get_run_logger()
    shown = StageProgress(stage)

    def take(line: str) -> None:
        if subprocess_group.is_stopped(owner):
            return  # How the stage takes its interruption is of no interest.
        progress = Progress.read(line)
        if progress is None or shown.is_worth_a_line(progress):
            logger.info(line)
        if progress is not None:
            shown.update(progress)

    try:
        with _accelerator(stage, accelerator_limit):
            outcome = run_stage(
                root, stage, environment=environment, owner=owner, timeout_hours=timeout_hours, on_line=take
            )
            return _state(stage, outcome)
    except subprocess_group.StoppedError:
        return Cancelled(message="Stopped.")
    except ConcurrencySlotAcquisitionError as error:
        hint = f"`prefect global-concurrency-limit create {accelerator_limit} --limit 1` creates one."
        return Failed(name=Ending.FAILED.value, message=f"{stage}: {error} {hint}")


def _accelerator(stage: str, limit: str | None) -> contextlib.AbstractContextManager[None]:
    if limit is None or stage.partition("@")[0] not in ACCELERATED:
        return contextlib.nullcontext()
    # A slot whose lease could not be renewed once is no reason to end hours of work.
    return concurrency(limit, strict=True, raise_on_lease_renewal_failure=False)


def _state(stage: str, outcome: Outcome) -> State[None]:
    if outcome.ending in {Ending.REJECTED, Ending.FAILED}:
        return Failed(name=outcome.ending.value, message=f"{stage}: {outcome.message}")
    return Completed(name=outcome.ending.value, message=f"{stage}: on {platform.node()}, process {os.getpid()}")


@task(
    name="publish",
    task_run_name="publish@{model}-{budget}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=_is_worth_another_try,
    retries=1,
)
def publish_version(model: str, budget: str) -> Publication | State[None]:
    """Registers a checkpoint in MLflow, unless it is registered."""
    try:
        publication = publish(model, budget, orchestrator={"prefect_flow_run": str(flow_run.id)})
    except NumpruneError as error:
        return Failed(name=Ending.REJECTED.value, message=f"publish@{model}-{budget}: {error}")
    what = "published as" if publication.is_new else "is already"
    get_run_logger().info("%s at %s %s version %d", model, budget, what, publication.version)
    return publication


@flow(name="compress", persist_result=False)
def compress(accelerator_limit: str | None = None) -> Report | State[None]:
    """Runs what is not up to date, publishes what is new, and shows dense against pruned.

    Args:
        accelerator_limit: Name of the Prefect concurrency limit of which a stage that runs a model takes one slot.
    """
    try:
        parameters = _checked_parameters()
        states = _run_stages(parameters, accelerator_limit)
    except NumpruneError as error:
        return Failed(name=Ending.REJECTED.value, message=str(error))
    if failed := _failed(states):
        return failed
    # One after the other: MLflow numbers versions in the order of registration.
    published = [
        publish_version(model, budget, return_state=True)
        for model in parameters.models
        for budget in parameters.budgets
    ]
    if failed := _failed(published):
        return failed
    publications = [cast(Publication, state.result()) for state in published]
    report = Report(rows=all_rows(parameters), publications=publications, endings=_endings(states))
    show_table(report.rows, "dense-against-pruned", report.sentence, {"version": report.versions})
    get_run_logger().info(report.sentence)
    return report


@flow(name="stages", persist_result=False)
def reproduce_all(accelerator_limit: str | None = None) -> Counter[str] | State[None]:
    """Runs what is not up to date and publishes nothing: a release is committed in between, a sweep has no versions.

    Args:
        accelerator_limit: Name of the Prefect concurrency limit of which a stage that runs a model takes one slot.

    Returns:
        How many stages ended in which state.
    """
    try:
        parameters = _checked_parameters()
        states = _run_stages(parameters, accelerator_limit)
    except NumpruneError as error:
        return Failed(name=Ending.REJECTED.value, message=str(error))
    return _failed(states) or _endings(states)


def _checked_parameters() -> Parameters:
    parameters = load_parameters()
    check_inputs(parameters)
    return parameters


def _run_stages(parameters: Parameters, accelerator_limit: str | None) -> list[State[Any]]:
    """How every stage ended."""
    options = parameters.orchestration
    stage_task = reproduce.with_options(retries=options.retries)
    # The same on every worker; the stages name their files relative to it.
    root = Path.cwd()
    graph = stage_graph(root)
    futures: dict[str, PrefectFuture[Any]] = {}
    with stage_runner(parameters) as runner:
        for group in side_by_side(graph):
            for stage in group:
                arguments = {
                    "stage": stage,
                    "root": root,
                    "environment": stage_environment(root),
                    "timeout_hours": options.timeout_hours,
                    "accelerator_limit": accelerator_limit,
                }
                futures[stage] = runner.submit(stage_task, arguments, (futures[n] for n in sorted(graph[stage])))
            for stage in group:
                futures[stage].wait()
        return [future.state for future in futures.values()]


def _endings(states: Sequence[State[Any]]) -> Counter[str]:
    return Counter(str(state.name) for state in states)


def _failed(states: Sequence[State[Any]]) -> State[None] | None:
    """What the states of failed tasks have to say together; None if all of them completed."""
    if all(state.is_completed() for state in states):
        return None
    left_out = sum(state.is_pending() for state in states)
    failures = [state for state in states if not (state.is_completed() or state.is_pending())]
    rejected = all(state.name == Ending.REJECTED.value for state in failures)
    messages = [state.message or "The Dask worker that ran a stage was lost." for state in failures]
    if left_out:
        messages.append(f"{left_out} further tasks were left out because they need these results.")
    return Failed(name=(Ending.REJECTED if rejected else Ending.FAILED).value, message="\n".join(messages))


def show_table(rows: Sequence[Row], key: str, sentence: str, further: Mapping[str, Column]) -> None:
    """Shows dense against pruned on Prefect's page and in the terminal.

    Args:
        rows: Of the table.
        key: Of the artifact on Prefect's page.
        sentence: What the run did.
        further: Columns that only this run has.
    """
    table = print_table(rows, sentence, further)
    create_table_artifact(table, key=key, description=f"Dense against pruned. {sentence}")
