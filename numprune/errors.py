"""The error for everything a user can mend, and how commands report it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The exit code of a command that stops for something the user can mend.
USER_MISTAKE = 2


class NumpruneError(Exception):
    """Input, data or a machine limit that stops the work; the message says what is wrong, where, and what to do."""


@contextmanager
def reported(*, debug: bool = False) -> Iterator[None]:
    """Turns a NumpruneError into its message on standard error and exit code 2; `debug` lets it through."""
    try:
        yield
    except NumpruneError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_MISTAKE)
