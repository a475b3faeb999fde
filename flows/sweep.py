"""Measure many models and budgets at once: one capture and one scoring a model, the rest side by side.

A sweep has parameters and results of its own, in a workspace beside the checkout that shares code, models and the cache
with it (`tasks/workspace.py`): `params.yaml`, `dvc.lock` and `artifacts/` of the checkout stay as they are. Nothing is
registered. Run it from the root of the repository:

    python -m flows.sweep --budgets 0.1,0.2,0.3,0.4,0.5
"""

import contextlib
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, cast

from flows.environment import prepare_environment

prepare_environment()

import typer  # noqa: E402
from prefect import flow, get_run_logger, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.states import Failed  # noqa: E402

from flows.checks import check_inputs  # noqa: E402
from flows.command import exit_code  # noqa: E402
from flows.pipeline import reproduce_all, show_table  # noqa: E402
from flows.server import start_server  # noqa: E402
from flows.stages import Ending  # noqa: E402
from flows.table import counted  # noqa: E402
from numprune.errors import NumpruneError  # noqa: E402
from numprune.files import replace_on_success  # noqa: E402
from tasks.layout import REPORT, SWEEP_REPORT  # noqa: E402
from tasks.parameters import Parameters, load_parameters  # noqa: E402
from tasks.publish import git_state  # noqa: E402
from tasks.summary import all_rows  # noqa: E402
from tasks.sweep import SweepRecord, record_sweep  # noqa: E402
from tasks.workspace import alone, open_workspace  # noqa: E402

WORKSPACE = Path(".numprune/sweep")


@task(task_run_name="record", cache_policy=NO_CACHE, persist_result=False, retries=1)
def record(parameters: Parameters, source: dict[str, str]) -> SweepRecord:
    """Logs the sweep in MLflow, unless that is done."""
    return record_sweep(parameters, source)


@flow(name="sweep", persist_result=False)
def sweep(
    models: list[str] | None = None, budgets: list[str] | None = None, accelerator_limit: str | None = None
) -> SweepRecord | State[None]:
    """Measures every model at every budget, writes the report of all of them and records it in MLflow.

    Args:
        models: Folders below models/; by default those of `params.yaml`.
        budgets: As in `params.yaml`; by default `sweep.budgets`.
        accelerator_limit: Name of the Prefect concurrency limit of which a stage that runs a model takes one slot.
    """
    root = Path.cwd()
    try:
        parameters, changes = _asked(models, budgets)
        with alone(WORKSPACE):
            open_workspace(root / WORKSPACE, root, parameters, changes)
            source = git_state()
            # The stages name their files relative to the folder they run in.
            with contextlib.chdir(WORKSPACE):
                return _measure(root, parameters, source, accelerator_limit)
    except NumpruneError as error:
        return Failed(name=Ending.REJECTED.value, message=str(error))


def _measure(
    root: Path, parameters: Parameters, source: dict[str, str], accelerator_limit: str | None
) -> SweepRecord | State[None]:
    stages = reproduce_all(accelerator_limit, return_state=True)
    if not stages.is_completed():
        # Prefect would only count the states that a flow returns.
        return Failed(name=stages.name, message=stages.message)
    endings = cast(Counter[str], stages.result())
    recorded = record(parameters, source)
    rows = all_rows(parameters)
    with replace_on_success(root / SWEEP_REPORT) as folder:
        shutil.copytree(REPORT, folder)
    state = "is recorded" if recorded.is_new else "is already recorded"
    sentence = f"{counted(endings)}; the sweep {state} in MLflow as run {recorded.run_id}."
    show_table(rows, "dense-against-pruned-sweep", sentence, {})
    get_run_logger().info(sentence)
    print(f"Report: {SWEEP_REPORT / 'index.html'} (numprune report sweep --open)")
    return recorded


def _asked(models: list[str] | None, budgets: list[str] | None) -> tuple[Parameters, dict[str, Any]]:
    """The parameters of the sweep, checked, and what differs from the file."""
    given = load_parameters()
    changes: dict[str, Any] = {"budgets": budgets or given.sweep.budgets}
    if models:
        changes["models"] = models
    parameters = load_parameters(changes=changes)
    check_inputs(parameters)
    return parameters, changes


def main(
    budgets: Annotated[
        str | None, typer.Option(help="With commas between, as in 0.1,0.2,size-8MB; by default sweep.budgets.")
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Folders below models/, with commas between; by default models.")
    ] = None,
) -> None:
    """Measures every model at every budget, without touching params.yaml, its results and the registered versions."""
    asked = {name: value.split(",") if value else None for name, value in (("models", models), ("budgets", budgets))}

    def run() -> State[Any]:
        _asked(**asked)  # A mistake is said before Prefect's server is started.
        start_server()()
        return sweep(**asked, return_state=True)

    sys.exit(exit_code(run))


if __name__ == "__main__":
    typer.run(main)
