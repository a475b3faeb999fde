"""How a flow runs as a command: its exit code, and its messages on standard error."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flows.stages import Ending
from numprune.errors import USER_MISTAKE, NumpruneError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State


def exit_code(run: Callable[[], "State[Any] | None"]) -> int:
    """Runs a flow; returns 0, 2 for a mistake in the input, 1 for another failure, 130 after Ctrl-C.

    Args:
        run: Calls the flow and returns its state; None if there was nothing to run. It checks params.yaml before: a
            mistake is said before Prefect's server is started.
    """
    try:
        state = run()
    except NumpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("Stopped. What was finished stays; the next run goes on from there.", file=sys.stderr)
        return 130
    if state is None or state.is_completed():
        return 0
    print(f"error: {state.message}", file=sys.stderr)
    return USER_MISTAKE if state.name == Ending.REJECTED.value else 1
