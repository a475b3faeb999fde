"""Look for new releases: `python -m flows.watch` asks every source of params.yaml once.

What is new is announced by an event, which starts the deployment `release` (see prefect.yaml). With `--here` it is
compressed in this process instead, one release after another: for one machine without a server.
"""

import sys
import time
from typing import Annotated, Any

from flows.environment import prepare_environment

prepare_environment()

import typer  # noqa: E402
from prefect import flow, get_run_logger  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402

from flows.events import release_found  # noqa: E402
from flows.release import HELD, release  # noqa: E402
from flows.stages import Ending  # noqa: E402
from numprune.errors import USER_MISTAKE  # noqa: E402
from tasks.parameters import load_parameters  # noqa: E402
from tasks.releases.ledger import Entry, Key, Ledger, shaping_hash  # noqa: E402
from tasks.releases.sources import find_releases  # noqa: E402
from tasks.step import run_step  # noqa: E402


@flow(name="watch", persist_result=False)
def watch() -> int:
    """Announces every release that is new, or that was announced before and left lying.

    Returns:
        How many were announced.
    """
    log = get_run_logger()
    parameters = load_parameters()
    ledger = Ledger.of(parameters.watch)
    shaping = shaping_hash(parameters)
    announced = 0
    for found in find_releases(parameters.watch, revision=ledger.folder_revision, log=log):
        if ledger.announce(found, shaping):
            log.info("%s at %s is announced.", found.name, found.revision[:12])
            release_found(Key(found.name, found.revision, shaping))
            announced += 1
    log.info("%d announced.", announced)
    return announced


def _watch_once(
    here: Annotated[bool, typer.Option(help="Compress what is new in this process, without any deployment.")] = False,
) -> None:
    """Asks every source once."""
    load_parameters()  # Before Prefect's server is started: a mistake in params.yaml is said at once.
    try:
        watch()
        code = _compress_all() if here else 0
    except KeyboardInterrupt:
        print("Stopped. What was finished stays; the next run goes on from there.", file=sys.stderr)
        code = 130
    sys.exit(code)


def _compress_all() -> int:
    parameters = load_parameters()
    ledger = Ledger.of(parameters.watch)
    codes = [0]
    for entry in ledger.unfinished(shaping_hash(parameters)):
        state = _compress(entry, wait_seconds=parameters.watch.lease_seconds)
        print(f"{entry.key.name} {entry.key.revision[:12]}: {state.message or state.name}", flush=True)
        if not state.is_completed():
            codes.append(USER_MISTAKE if state.name == Ending.REJECTED.value else 1)
    return max(codes)


def _compress(entry: Entry, wait_seconds: float) -> State[Any]:
    key = entry.key
    state = release(key.name, key.revision, key.parameters, return_state=True)
    if state.name == HELD:
        # By a run that is alive, or by one that was killed and whose claim ends within this time.
        print(f"{key.name}: {state.message} Waiting {wait_seconds:g} s for a sign of life.", flush=True)
        time.sleep(wait_seconds)
        state = release(key.name, key.revision, key.parameters, return_state=True)
    return state


if __name__ == "__main__":
    run_step(_watch_once)
