"""Compress one release from beginning to end: worktree, stages, commit, push, registration.

A run takes the release in the ledger, so that no second one works on it, and gives a sign of life as long as it runs.
Killed at any moment, it leaves a claim that grows stale; the next run takes over, mends the worktree and goes on.
"""

import contextlib
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from flows.environment import prepare_environment

prepare_environment()

from prefect import flow, get_run_logger, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402

from flows.events import version_registered  # noqa: E402
from flows.fanout import stop_all  # noqa: E402
from flows.pipeline import publish_version, reproduce_all  # noqa: E402
from flows.stages import Ending, end_fork_server  # noqa: E402
from numprune.errors import NumpruneError  # noqa: E402
from tasks.parameters import Parameters, load_parameters  # noqa: E402
from tasks.publish import Publication  # noqa: E402
from tasks.releases import checkout  # noqa: E402
from tasks.releases.ledger import DONE, Entry, Key, Ledger  # noqa: E402

# Nothing to do: somebody else works on the release, or it is done.
HELD = "Held"

# Signs of life in the time after which a run counts as dead: a few may come late.
_BEATS = 5


class ClaimLostError(Exception):
    """The release was taken over by another run, because this one gave no sign of life for too long."""


class _Claim:
    """A release held by this run, with a thread that gives signs of life."""

    def __init__(self, ledger: Ledger, key: Key, owner: str) -> None:
        self._ledger, self._key, self._owner = ledger, key, owner
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @contextlib.contextmanager
    def kept(self) -> Iterator["_Claim"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()

    def check(self) -> None:
        """Raises ClaimLostError if another run took over; asked before everything that others see."""
        if self._lost.is_set() or not self._ledger.beat(self._key, self._owner):
            raise ClaimLostError(f"{self._key.name}: another run took this release over.")

    def _beat(self) -> None:
        while not self._stop.wait(self._ledger.lease_seconds / _BEATS):
            # A database that cannot be reached for a moment is no reason to end; the claim is checked again at the end.
            with contextlib.suppress(Exception):
                if not self._ledger.beat(self._key, self._owner):
                    self._lost.set()
                    stop_all()
                    return


@task(task_run_name="prepare", cache_policy=NO_CACHE, persist_result=False)
def prepare(entry: Entry, parameters: Parameters, root: Path) -> Path:
    """Makes or mends the worktree."""
    return checkout.prepare(entry, parameters, root)


@task(task_run_name="commit", cache_policy=NO_CACHE, persist_result=False)
def commit(entry: Entry, folder: Path) -> str:
    """Commits what was run on what, and what came out."""
    made = checkout.commit(entry, folder)
    get_run_logger().info("%s is at %s", entry.branch, made[:12])
    return made


@task(task_run_name="push", cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=10)
def push(entry: Entry, folder: Path, git_remote: str | None) -> None:
    """Sends the results to DVC's default remote and the branch to the git remote, where there are such."""
    remote = checkout.push(folder)
    said = f"Results are on the DVC remote {remote}." if remote else "No default DVC remote is configured: not pushed."
    get_run_logger().info(said)
    if git_remote is not None:
        checkout.push_branch(entry, folder, git_remote)
        get_run_logger().info("The branch %s is on %s.", entry.branch, git_remote)


def _run_name() -> str:
    return f"{flow_run.parameters['name']}@{flow_run.parameters['revision'][:12]}"


@flow(name="release", flow_run_name=_run_name, persist_result=False)
def release(name: str, revision: str, parameters: str, accelerator_limit: str | None = None) -> State[Any]:
    """Compresses a release that the ledger knows, commits, pushes and registers the result.

    Args:
        name: Of the release, as in the ledger.
        revision: Its exact state.
        parameters: Hash of the parameters it was announced with.
        accelerator_limit: Name of the Prefect concurrency limit of which a stage that runs a model takes one slot.
    """
    root = Path.cwd()
    settings = load_parameters()
    ledger = Ledger.of(settings.watch)
    key = Key(name, revision, parameters)
    # Not the flow run alone: Prefect runs one again under the same number.
    owner = f"{flow_run.id}/{uuid.uuid4().hex[:8]}"
    if not ledger.claim(key, owner):
        return _not_claimed(ledger.read(key), key)
    entry = ledger.read(key)
    assert entry is not None
    try:
        with _Claim(ledger, key, owner).kept() as claim:
            failed = _compress(entry, settings, root, accelerator_limit, claim)
            if failed is None:
                checkout.remove(entry, settings, root)
                ledger.finish(key, owner)
                return Completed(
                    message=f"{name} {revision[:12]} is registered; its record is the branch {entry.branch}."
                )
    except ClaimLostError as error:
        return Completed(name=HELD, message=str(error))
    except NumpruneError as error:
        failed = Failed(name=Ending.REJECTED.value, message=str(error))
    except Exception as error:
        ledger.fail(key, owner, f"{type(error).__name__}: {error}", retryable=True)
        raise
    except BaseException:  # Ctrl-C, or the worker was told to end: the next run goes on.
        ledger.give_back(key, owner)
        raise
    ledger.fail(key, owner, failed.message or "", retryable=failed.name != Ending.REJECTED.value)
    return failed


def _not_claimed(entry: Entry | None, key: Key) -> State[Any]:
    if entry is None:
        return Failed(name=Ending.REJECTED.value, message=f"The ledger knows no release {key.name} at {key.revision}.")
    if entry.state == DONE:
        return Completed(name=Ending.UNCHANGED.value, message=f"{key.name} {key.revision[:12]} is done.")
    return Completed(name=HELD, message=f"{key.name} {key.revision[:12]} is being compressed by run {entry.owner}.")


def _compress(
    entry: Entry, settings: Parameters, root: Path, accelerator_limit: str | None, claim: _Claim
) -> State[Any] | None:
    """Everything that happens in the worktree; returns the state of what failed, None if nothing did."""
    folder = prepare(entry, settings, root)
    # The stages, git and the registry name their files relative to the folder they run in.
    with contextlib.chdir(folder):
        try:
            stages = reproduce_all(accelerator_limit, return_state=True)
        finally:
            end_fork_server(Path.cwd())  # A watcher runs one release after the other.
        claim.check()
        if not stages.is_completed():
            return _as_own(stages)
        commit(entry, folder)
        push(entry, folder, settings.watch.git_remote)
        claim.check()
        versions: list[Publication] = []
        for budget in load_parameters().budgets:
            state = publish_version(entry.key.name, budget, return_state=True)
            if not state.is_completed():
                return _as_own(state)
            versions.append(cast(Publication, state.result()))
    for version in versions:
        version_registered(version.model, version.version)
    return None


def _as_own(state: State[Any]) -> State[Any]:
    """The state of another run as that of this one; Prefect would only count the states a flow returns."""
    return Failed(name=state.name, message=state.message)
