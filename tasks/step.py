"""How every step runs from the command line, as `python -m tasks STEP MODEL [BUDGET]`."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import typer

from numprune.errors import reported
from numprune.memory import use_huge_pages
from numprune.ranks import is_under_torchrun, joined


def run_step(step: Callable[..., Any], *, shared: bool = False, beside_others: bool = False) -> None:
    """Runs a step with the arguments of the command line.

    With `shared`, as many processes as `compute.processes` says share the step's calibration samples; `torchrun` starts
    them, and may be used instead, for several machines. With `beside_others`, for a step that runs once a budget, the
    process takes its share of the cores, since the same step runs for other budgets at the same time. That does not
    depend on whether it really does: the last bits of a result depend on the number of threads.

    A `NumpruneError` ends the process with exit code 2 and its message as the last thing on standard error, after
    `error: `; `flows/stages.py` reads both.
    """
    use_huge_pages()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(step)
    with reported():
        if shared or beside_others:
            from tasks.parameters import load_parameters  # Needs pydantic, which benchmarks do without.

            parameters = load_parameters()
            if shared and not is_under_torchrun() and parameters.compute.processes > 1:
                _start(parameters.compute.processes)
            if beside_others:
                torch.set_num_threads(max(1, torch.get_num_threads() // parameters.workers))
        with joined():
            app()


def _start(processes: int) -> NoReturn:
    """Runs the same command in several processes and ends with their exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    module = sys.modules["__main__"].__spec__
    assert module is not None
    count = f"--nproc-per-node={processes}"
    try:
        run(parse_args(["--standalone", count, "-m", module.name, *sys.argv[1:]]))
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)
    sys.exit(0)
