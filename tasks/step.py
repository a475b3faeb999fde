"""How every step runs from the command line, as `python -m tasks.<step> MODEL [RATIO]`."""

import sys
from collections.abc import Callable

import typer

from numprune.errors import NumpruneError

USER_MISTAKE = 2


def run_step(step: Callable[..., None]) -> None:
    """Runs a step with the arguments of the command line.

    A `NumpruneError` ends the process with exit code 2 and its message as the last thing on stderr, after `error: `;
    `flows/compress.py` reads both.
    """
    try:
        typer.run(step)
    except NumpruneError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_MISTAKE)
