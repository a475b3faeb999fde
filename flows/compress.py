"""Compress every model at every budget of params.yaml, evaluate, benchmark and publish the results.

Run it from the root of the repository:

    python -m flows.compress
"""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.environment import prepare_environment

prepare_environment()

from flows.command import exit_code  # noqa: E402
from flows.server import start_server  # noqa: E402
from flows.stages import Ending, is_unchanged, stage_environment, stage_graph  # noqa: E402
from flows.table import Report, print_table  # noqa: E402
from tasks.parameters import Parameters, load_parameters  # noqa: E402
from tasks.publish import find_publication  # noqa: E402
from tasks.registry.connection import connect  # noqa: E402
from tasks.summary import all_rows  # noqa: E402

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State


def up_to_date(parameters: Parameters) -> Report | None:
    """What a run would come to that had nothing to do; None if there is something to do.

    It asks DVC and MLflow alone. Prefect, which takes longer to start than both take to answer, has no run of it.
    """
    stages = stage_graph(Path())
    if not is_unchanged(Path(), *stages):
        return None
    found = [find_publication(model, budget) for model in parameters.models for budget in parameters.budgets]
    publications = [publication for publication in found if publication is not None]
    if len(publications) < len(found):
        return None
    return Report(all_rows(parameters), publications, Counter({Ending.UNCHANGED.value: len(stages)}))


def main() -> int:
    """Runs the flow unless everything is up to date; returns its exit code."""

    def run() -> "State[Any] | None":
        parameters = load_parameters()
        if report := up_to_date(parameters):
            print_table(report.rows, report.sentence, {"version": report.versions})
            return None
        from flows.checks import check_inputs

        check_inputs(parameters)
        # Both servers start while this process imports the flow and makes the tables of MLflow's database.
        use_server = start_server()
        stage_environment(Path.cwd())
        from flows.pipeline import compress

        connect(parameters.registry)
        use_server()
        return compress(return_state=True)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
