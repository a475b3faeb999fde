"""A forked process behaves as one that was started, and no process outlives who asked for it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tasks.forked import SOCKET
from tasks.forkserver import fork_server
from tests.flows.conftest import ROOT

linux = pytest.mark.skipif(sys.platform != "linux", reason="Processes are forked on Linux alone.")

PROGRAM = """
import atexit, os, pathlib, subprocess, sys, threading, time

import imported

what, *arguments = sys.argv[1:]
if what == "echo":
    print(arguments, os.environ["GIVEN"], os.getcwd(), sys.stdin.read(), __name__)
    print("to stderr", file=sys.stderr)
elif what == "exit":
    sys.exit(int(arguments[0]) if arguments[0].isdigit() else arguments[0])
elif what == "crash":
    raise KeyError("broken")
elif what == "late":
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.2), print("in a thread"))).start()
elif what == "kill":
    os.kill(os.getpid(), 9)
elif what == "wait":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        print(os.getpid(), child.pid, flush=True)
        time.sleep(60)
    finally:
        child.wait()
        print("tidied up", flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a program, and a module that notes each import of it."""
    return with_program(tmp_path_factory.mktemp("programs"))


def with_program(folder: Path) -> Path:
    (folder / "program.py").write_text(PROGRAM)
    (folder / "imported.py").write_text("import os\nwith open('imports', 'a') as file: print(os.getpid(), file=file)\n")
    (folder / "tasks").symlink_to(ROOT / "tasks")
    return folder


@pytest.fixture(scope="module")
def forking(folder: Path) -> Iterator[Mapping[str, str]]:
    with fork_server(folder, ["imported", "not_installed"]) as environment:
        yield environment


@pytest.fixture(params=["started", pytest.param("forked", marks=linux)])
def environment(request: pytest.FixtureRequest, forking: Mapping[str, str]) -> Mapping[str, str]:
    return forking if request.param == "forked" else {}


def start(folder: Path, environment: Mapping[str, str], *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.forked", "program", *arguments],
        cwd=folder,
        env={**os.environ, "GIVEN": "value", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, environment: Mapping[str, str], *arguments: str, text: str = "") -> tuple[int, str, str]:
    process = start(folder, environment, *arguments)
    output, errors = process.communicate(text, timeout=60)
    return process.returncode, output, errors


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_arguments_streams_environment_and_folder(folder: Path, environment: Mapping[str, str]) -> None:
    code, output, errors = run(folder, environment, "echo", "a b", "--c", text="typed")
    assert (code, output) == (0, f"['a b', '--c'] value {folder} typed __main__\n")
    assert errors == "to stderr\n"


@pytest.mark.parametrize("code", [0, 2, 255])
def test_exit_code(folder: Path, environment: Mapping[str, str], code: int) -> None:
    assert run(folder, environment, "exit", str(code)) == (code, "", "")


def test_message_as_exit_code(folder: Path, environment: Mapping[str, str]) -> None:
    assert run(folder, environment, "exit", "wrong") == (1, "", "wrong\n")


def test_crash(folder: Path, environment: Mapping[str, str]) -> None:
    code, output, errors = run(folder, environment, "crash")
    assert (code, output) == (1, "")
    assert errors.startswith("Traceback (most recent call last):\n")
    assert errors.endswith("KeyError: 'broken'\n")


def test_threads_and_exit_functions_are_waited_for(folder: Path, environment: Mapping[str, str]) -> None:
    assert run(folder, environment, "late") == (0, "in a thread\nat exit\n", "")


@linux
def test_killed(folder: Path, forking: Mapping[str, str]) -> None:
    assert run(folder, forking, "kill") == (137, "", "")


@linux
def test_modules_are_imported_once(folder: Path, forking: Mapping[str, str]) -> None:
    run(folder, forking, "exit", "0")
    before = (folder / "imports").read_text().split()
    assert run(folder, forking, "exit", "0")[0] == 0
    assert (folder / "imports").read_text().split() == before
    assert run(folder, {}, "exit", "0")[0] == 0
    assert len((folder / "imports").read_text().split()) == len(before) + 1


@linux
def test_interrupt_is_passed_on(folder: Path, forking: Mapping[str, str]) -> None:
    process = start(folder, forking, "wait")
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "tidied up\n")
    assert errors.endswith("KeyboardInterrupt\n")
    assert not any(map(is_running, pids))


@linux
def test_interrupt_before_the_fork_starts_nothing(folder: Path, tmp_path: Path) -> None:
    """The fork server goes away while it is waited for; the program would be started without it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path := tmp_path / "s"))
        listener.listen()
        process = start(folder, {SOCKET: str(path)}, "echo")
        with listener.accept()[0] as connection:
            with connection.makefile("rb") as sent:
                sent.readline()
                sent.readline()
            eventually(lambda: bool(_sigcgt(process.pid) & 1 << (signal.SIGTERM - 1)))
            process.send_signal(signal.SIGTERM)
            assert connection.recv(1) == bytes([signal.SIGTERM])
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (-signal.SIGTERM, "")


def _sigcgt(pid: int) -> int:
    """The signals that a process handles, as bits."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return int(line.split()[1], 16)


@linux
def test_nothing_outlives_who_asked(folder: Path, forking: Mapping[str, str]) -> None:
    process = start(folder, forking, "wait")
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    eventually(lambda: not any(map(is_running, pids)))
    process.communicate(timeout=30)


@linux
def test_fork_server_ends_with_who_started_it(folder: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-m", "tasks.forkserver", "program", "wait"], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    (server,) = psutil.Process(owner.pid).children()
    owner.kill()
    owner.wait()
    eventually(lambda: not server.is_running())
    eventually(lambda: not any(map(is_running, pids)))


@linux
def test_changed_code_is_imported_anew(tmp_path: Path) -> None:
    folder = with_program(tmp_path)
    with fork_server(folder, ["imported"]) as environment:
        for imports, change in (1, False), (1, False), (2, True), (3, False):
            if change:
                os.utime(folder / "imported.py")
            assert run(folder, environment, "exit", "3") == (3, "", "")
            assert len((folder / "imports").read_text().split()) == imports


@linux
def test_fork_server_that_is_gone(folder: Path) -> None:
    with fork_server(folder, ["imported"]) as environment:
        pass
    # The module is started.
    assert run(folder, environment, "exit", "3") == (3, "", "")


def test_step_that_is_not_named() -> None:
    done = subprocess.run([sys.executable, "-m", "tasks"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: usage: python -m tasks STEP")
