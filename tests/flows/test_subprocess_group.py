import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import subprocess_group


def run(command: list[str], *, owner: str = "test", timeout: float, on_line: Callable[[str], None]) -> int:
    return subprocess_group.run(command, folder=Path(), environment={}, owner=owner, timeout=timeout, on_line=on_line)


def python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", program, *arguments]


# A step that tidies up when it is interrupted, below a parent that, like DVC, does not hear Ctrl-C while it runs.
TIDY = """
import pathlib, sys, time
temporary = pathlib.Path(sys.argv[1])
temporary.write_text("half")
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    temporary.unlink()
"""
PARENT = f"""
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {TIDY!r}, sys.argv[1]])
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.exit(child.wait() and 1)
"""
WAITING = """
import pathlib, sys, time
print("ready", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.02)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def test_lines_of_both_streams_and_the_exit_code() -> None:
    lines: list[str] = []
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert run(python(program), timeout=30, on_line=lines.append) == 3
    assert sorted(lines) == ["err", "out"]


def test_timeout_ends_the_group(tmp_path: Path) -> None:
    temporary = tmp_path / "partial"
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        run(python(PARENT, str(temporary)), timeout=1.5, on_line=lambda _: None)
    assert time.monotonic() - start < 15
    assert not temporary.exists()


def test_stop_lets_a_step_tidy_up_and_starts_nothing_more(tmp_path: Path) -> None:
    temporary = tmp_path / "partial"
    ready = threading.Event()
    stopper = threading.Thread(target=lambda: (ready.wait(30), subprocess_group.stop("stopped")))
    stopper.start()
    with pytest.raises(subprocess_group.StoppedError):
        run(python(PARENT, str(temporary)), owner="stopped", timeout=60, on_line=lambda _: ready.set())
    stopper.join()
    assert not temporary.exists()
    with pytest.raises(subprocess_group.StoppedError):
        run(python("print()"), owner="stopped", timeout=60, on_line=lambda _: None)


def test_stop_leaves_what_others_started(tmp_path: Path) -> None:
    go = tmp_path / "go"

    def stop_another(_line: str) -> None:
        subprocess_group.stop("another")
        go.touch()

    assert run(python(WAITING, str(go)), owner="own", timeout=30, on_line=stop_another) == 0


def test_what_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    graces = ((signal.SIGINT, 0.2), (signal.SIGTERM, 0.2), (signal.SIGKILL, 5.0))
    monkeypatch.setattr(subprocess_group, "_GRACE_SECONDS", graces)
    with pytest.raises(TimeoutError):
        run(python(DEAF), timeout=2, on_line=lambda _: None)


def test_error_while_reading_ends_the_group() -> None:
    pids: list[int] = []

    def fail(line: str) -> None:
        pids.append(int(line))
        raise RuntimeError("Prefect is gone")

    with pytest.raises(RuntimeError, match="Prefect is gone"):
        run(python("import os, time; print(os.getpid(), flush=True); time.sleep(60)"), timeout=60, on_line=fail)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
