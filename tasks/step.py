"""How every step runs from the command line, as `python -m tasks.<step> MODEL [RATIO]`."""

from collections.abc import Callable
from typing import Any

import typer

from numprune.errors import reported


def run_step(step: Callable[..., Any]) -> None:
    """Runs a step with the arguments of the command line.

    A `NumpruneError` ends the process with exit code 2 and its message as the last thing on standard error, after
    `error: `; `flows/compress.py` reads both.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(step)
    with reported():
        app()
