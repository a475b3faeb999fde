"""The error for everything a user can mend, and how commands report it."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What a user can mend about files: a full disk, a folder that may not be written.
_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

# The exit code of a command that stops for something the user can mend.
USER_MISTAKE = 2


class NumpruneError(Exception):
    """Input, data or a machine limit that stops the work; the message says what is wrong, where, and what to do."""


@contextmanager
def reported(*, debug: bool = False) -> Iterator[None]:
    """Turns what a user can mend into a message on standard error and exit code 2; `debug` lets it through."""
    try:
        yield
    except (NumpruneError, OSError) as error:
        if debug or (isinstance(error, OSError) and error.errno not in _MENDABLE):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_MISTAKE)
