"""Compress every model at every budget of params.yaml, evaluate, benchmark and publish the results.

A Prefect task for each stage of `dvc.yaml`, in the order of its graph. DVC decides what has to run and keeps the
results; Prefect decides when, tries again, stops and shows. Run it from the root of the repository:

    python -m flows.compress
"""

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from flows import subprocess_group  # noqa: E402
from flows.checks import check_inputs  # noqa: E402
from flows.progress import StageProgress  # noqa: E402
from flows.stages import Ending, Outcome, Progress, is_unchanged, run_stage, side_by_side, stage_graph  # noqa: E402
from numprune.errors import USER_MISTAKE, NumpruneError  # noqa: E402
from tasks.parameters import Parameters, load_parameters  # noqa: E402
from tasks.publish import Publication, publish  # noqa: E402
from tasks.summary import COLUMNS, Row, all_rows, cells  # noqa: E402

ROOT = Path()

# The stages that run a model, on an accelerator if there is one.
ACCELERATED = {"capture", "score", "prune", "compensate", "evaluate_dense", "evaluate", "benchmark"}

# MLflow numbers versions in the order of registration: one at a time, lest two publishers race.
_publishing = threading.Lock()


@dataclass(frozen=True)
class Report:
    """What a run of the flow did."""

    rows: list[Row]
    publications: list[Publication]
    endings: Counter[str]

    @property
    def sentence(self) -> str:
        """How many stages ran, and how many versions are new."""
        new = sum(publication.is_new for publication in self.publications)
        return f"{counted(self.endings)}; {new} of {len(self.publications)} versions newly published."


def counted(endings: Counter[str]) -> str:
    """How many stages ran, and how many did not have to."""
    ran, unchanged, restored = (endings[e.value] for e in (Ending.COMPLETED, Ending.UNCHANGED, Ending.RESTORED))
    said = f"{ran} {'stage' if ran == 1 else 'stages'} run, {unchanged} unchanged"
    return f"{said}, {restored} restored from DVC's cache" if restored else said


def _is_worth_another_try(_task: Any, _run: Any, state: State[Any]) -> bool:
    return state.name == Ending.FAILED.value and not subprocess_group.is_stopping()


@task(
    name="stage",
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=_is_worth_another_try,
    retry_delay_seconds=2,
)
def reproduce(stage: str, timeout_hours: float, accelerator_limit: str | None) -> State[None]:
    """Brings one stage up to date; its state is named after how it ended.

    Args:
        stage: Its name, as in `evaluate@reference-llama-0.2`.
        timeout_hours: After which it is stopped.
        accelerator_limit: Name of the Prefect concurrency limit of which a stage that runs a model takes one slot.
    """
    if is_unchanged(ROOT, stage):
        return Completed(name=Ending.UNCHANGED.value)
    logger = get_run_logger()
    shown = StageProgress(stage)

    def take(line: str) -> None:
        if subprocess_group.is_stopping():
            return  # How the stage takes its interruption is of no interest.
        progress = Progress.read(line)
        if progress is None or shown.is_worth_a_line(progress):
            logger.info(line)
        if progress is not None:
            shown.update(progress)

    try:
        with _accelerator(stage, accelerator_limit):
            return _state(stage, run_stage(stage, timeout_hours=timeout_hours, on_line=take))
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
    return Completed(name=outcome.ending.value)


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
        with _publishing:
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
    except NumpruneError as error:
        return Failed(name=Ending.REJECTED.value, message=str(error))
    with _runner(parameters) as runner:
        stages = _submit_stages(runner, parameters, accelerator_limit)
        publications = _submit_publications(runner, parameters, stages)
        for future in (*stages.values(), *publications):
            future.wait()
    if failed := _failed([*stages.values(), *publications]):
        return failed
    report = Report(
        rows=all_rows(parameters),
        publications=[future.result() for future in publications],
        endings=_endings(stages),
    )
    versions = {(p.model, p.budget): str(p.version) for p in report.publications}
    show_table(report.rows, "dense-against-pruned", report.sentence, {"version": versions})
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
    except NumpruneError as error:
        return Failed(name=Ending.REJECTED.value, message=str(error))
    with _runner(parameters) as runner:
        stages = _submit_stages(runner, parameters, accelerator_limit)
        for future in stages.values():
            future.wait()
    return _failed([*stages.values()]) or _endings(stages)


def _checked_parameters() -> Parameters:
    parameters = load_parameters()
    check_inputs(parameters)
    return parameters


@contextlib.contextmanager
def _runner(parameters: Parameters) -> Iterator[ThreadPoolTaskRunner[Any]]:
    """Threads for the tasks; whatever ends the flow early ends the stages that run."""
    subprocess_group.allow()
    runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=parameters.workers)
    with runner:
        try:
            yield runner
        except BaseException:  # Ctrl-C and Prefect's cancellation among them.
            subprocess_group.stop_all()
            raise


def _submit_stages(
    runner: ThreadPoolTaskRunner[Any], parameters: Parameters, accelerator_limit: str | None
) -> dict[str, PrefectFuture[Any]]:
    options = parameters.orchestration
    stage_task = reproduce.with_options(retries=options.retries)
    futures: dict[str, PrefectFuture[Any]] = {}
    graph = stage_graph(ROOT)
    for group in side_by_side(graph):
        for stage in group:
            arguments = {
                "stage": stage,
                "timeout_hours": options.timeout_hours,
                "accelerator_limit": accelerator_limit,
            }
            futures[stage] = runner.submit(stage_task, arguments, wait_for=[futures[n] for n in sorted(graph[stage])])
        for stage in group:
            futures[stage].wait()
    return futures


def _submit_publications(
    runner: ThreadPoolTaskRunner[Any], parameters: Parameters, stages: dict[str, PrefectFuture[Any]]
) -> list[PrefectFuture[Any]]:
    futures: list[PrefectFuture[Any]] = []
    for model in parameters.models:
        for budget in parameters.budgets:
            measured = [f"evaluate_dense@{model}", f"evaluate@{model}-{budget}", f"benchmark@{model}-{budget}"]
            # The page of the run is logged with it.
            needed = [stages[name] for name in (*measured, "summary")]
            futures.append(runner.submit(publish_version, {"model": model, "budget": budget}, wait_for=needed))
    return futures


def _endings(stages: dict[str, PrefectFuture[Any]]) -> Counter[str]:
    return Counter(str(future.state.name) for future in stages.values())


def _failed(futures: list[PrefectFuture[Any]]) -> State[None] | None:
    states = [future.state for future in futures]
    failures = [state for state in states if state.is_failed() or state.is_crashed()]
    if not failures:
        return None
    rejected = all(state.name == Ending.REJECTED.value for state in failures)
    messages = [state.message or str(state) for state in failures]
    if left_out := sum(not state.is_final() for state in states):
        messages.append(f"{left_out} further tasks were left out because they need these results.")
    return Failed(name=(Ending.REJECTED if rejected else Ending.FAILED).value, message="\n".join(messages))


def show_table(
    rows: Sequence[Row], key: str, sentence: str, further: Mapping[str, Mapping[tuple[str, str], str]] | None = None
) -> None:
    """Shows dense against pruned on Prefect's page and in the terminal.

    Args:
        rows: Of the table.
        key: Of the artifact on Prefect's page.
        sentence: What the run did.
        further: Columns that only this run has: their cells by model and budget.
    """
    extra = further or {}
    columns = (*COLUMNS, *extra)
    lines = [
        (*cells(row), *(column.get((row["model"], row["budget"] or ""), "") for column in extra.values()))
        for row in rows
    ]
    table: list[dict[str, Any]] = [dict(zip(columns, line, strict=True)) for line in lines]
    create_table_artifact(table, key=key, description=f"Dense against pruned. {sentence}")
    drawn = Table(title="dense against pruned")
    for column in columns:
        drawn.add_column(column.replace(" ", "\n"), justify="left" if column == "model" else "right", no_wrap=True)
    for line in lines:
        drawn.add_row(*line)
    # Where the output is no terminal, its width is unknown, and a table cut at 80 columns cannot be read.
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(drawn)
    console.print(sentence, highlight=False)


def main() -> int:
    """Runs the flow; returns its exit code."""
    return exit_code(lambda: check_inputs(load_parameters()), lambda: compress(return_state=True))


def exit_code(check: Callable[[], object], run: Callable[[], State[Any]]) -> int:
    """Runs a flow; returns 0, 2 for a mistake in the input, 1 for another failure, 130 after Ctrl-C.

    Args:
        check: Called before Prefect's server is started: a mistake in params.yaml is said at once.
        run: Calls the flow and returns its state.
    """
    try:
        check()
        state = run()
    except NumpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("Stopped. What was finished stays; the next run goes on from there.", file=sys.stderr)
        return 130
    if state.is_completed():
        return 0
    print(f"error: {state.message}", file=sys.stderr)
    return USER_MISTAKE if state.name == Ending.REJECTED.value else 1


if __name__ == "__main__":
    sys.exit(main())
