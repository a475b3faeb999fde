"""Run a command with all it starts in a process group of its own, so that nothing of it outlives a stop."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# An interrupted step removes its temporary files; one that hangs is not waited for.
_GRACE_SECONDS = ((signal.SIGINT, 10.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))

_owners: dict["subprocess.Popen[str]", str] = {}
_lock = threading.Lock()
_stopped: set[str] = set()


class StoppedError(Exception):
    """The command was stopped, or not started, because the flow is being stopped."""


def run(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    owner: str,
    timeout: float,
    on_line: Callable[[str], None],
) -> int:
    """Runs a command and hands over each line that it or its children print.

    Args:
        command: Program and arguments.
        folder: To run it in.
        environment: Variables it has beside those of this process.
        owner: Whose command it is; see `stop`.
        timeout: Seconds after which the whole group is stopped.
        on_line: Called with each line of stdout and stderr, without its end.

    Returns:
        The exit code.

    Raises:
        TimeoutError: If it was still running after `timeout` seconds.
        StoppedError: If `stop` was called for its owner.
    """
    with _lock:
        if owner in _stopped:
            raise StoppedError
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        _owners[process] = owner
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        _stop(process)

    timer = threading.Timer(timeout, expire)
    timer.daemon = True
    timer.start()
    try:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                on_line(line.rstrip())
        code = process.wait()
    except BaseException:
        _stop(process)
        raise
    finally:
        timer.cancel()
        with _lock:
            del _owners[process]
    if owner in _stopped:
        raise StoppedError
    if expired.is_set():
        raise TimeoutError
    return code


def stop(owner: str) -> None:
    """Stops every running group of an owner and lets no further one start."""
    with _lock:
        _stopped.add(owner)
        processes = [process for process, its in _owners.items() if its == owner]
    stoppers = [threading.Thread(target=_stop, args=(process,)) for process in processes]
    for stopper in stoppers:
        stopper.start()
    for stopper in stoppers:
        stopper.join()


def is_stopped(owner: str) -> bool:
    """Whether `stop` was called for an owner."""
    return owner in _stopped


def _stop(process: "subprocess.Popen[str]") -> None:
    for number, grace in _GRACE_SECONDS:
        if not _group_exists(process):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and _group_exists(process):
            time.sleep(0.05)


def _group_exists(process: "subprocess.Popen[str]") -> bool:
    process.poll()  # Reaps the leader, which would count as a member otherwise.
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
