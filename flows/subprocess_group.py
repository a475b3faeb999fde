"""Run a command with all it starts in a process group of its own, so that nothing of it outlives a stop."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

# An interrupted step removes its temporary files; one that hangs is not waited for.
_GRACE_SECONDS = ((signal.SIGINT, 10.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))

_running: set["subprocess.Popen[str]"] = set()
_lock = threading.Lock()
_stopping = threading.Event()


class StoppedError(Exception):
    """The command was stopped, or not started, because the flow is being stopped."""


def run(command: Sequence[str], *, timeout: float, on_line: Callable[[str], None]) -> int:
    """Runs a command and hands over each line that it or its children print.

    Args:
        command: Program and arguments.
        timeout: Seconds after which the whole group is stopped.
        on_line: Called with each line of stdout and stderr, without its end.

    Returns:
        The exit code.

    Raises:
        TimeoutError: If it was still running after `timeout` seconds.
        StoppedError: If `stop_all` was called.
    """
    with _lock:
        if _stopping.is_set():
            raise StoppedError
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        _running.add(process)
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
            _running.discard(process)
    if _stopping.is_set():
        raise StoppedError
    if expired.is_set():
        raise TimeoutError
    return code


def stop_all() -> None:
    """Stops every running group and lets no further one start."""
    with _lock:
        _stopping.set()
        processes = list(_running)
    stoppers = [threading.Thread(target=_stop, args=(process,)) for process in processes]
    for stopper in stoppers:
        stopper.start()
    for stopper in stoppers:
        stopper.join()


def allow() -> None:
    """Lets commands start again after `stop_all`; a new flow run begins with it."""
    _stopping.clear()


def is_stopping() -> bool:
    """Whether `stop_all` was called since."""
    return _stopping.is_set()


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
