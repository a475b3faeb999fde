"""Programs that run until they are ended: started with a log of their own, waited for, ended with all they started."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from numprune.errors import NumpruneError

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """A running program."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    end_with: signal.Signals
    grace_seconds: float
    children_first: bool

    def wait_until(self, ready: Callable[[], bool], *, timeout: float) -> None:
        """Waits until it answers.

        Args:
            ready: Whether it does; asked several times a second.
            timeout: Seconds it is given.

        Raises:
            NumpruneError: If it ended or did not answer in time; the message names its log and quotes its end.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            if self.process.poll() is not None:
                raise NumpruneError(f"{self.name} ended with code {self.process.returncode}{self._last_lines()}")
            if time.monotonic() > deadline:
                raise NumpruneError(f"{self.name} did not answer within {timeout:g} seconds{self._last_lines()}")
            time.sleep(0.2)

    def end(self) -> None:
        """Ends it and everything it started, by force what does not end when asked."""
        # Flow runs have process groups of their own, so that the family tree is what finds them, and only
        # while their parents live.
        family = _descendants(self.process.pid)
        if self.children_first:
            # A worker would kill them at once; interrupted, they remove their temporary files.
            family = _ask_to_end(family, signal.SIGINT, self.grace_seconds)
        if self.process.poll() is None:
            self.process.send_signal(self.end_with)
        try:
            self.process.wait(self.grace_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        family = _ask_to_end(family, signal.SIGINT, self.grace_seconds)
        _ask_to_end(family, signal.SIGKILL, 5)

    def _last_lines(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        return "; the end of its log, " + "\n".join([f"{self.log}:", *lines])


def start(
    name: str,
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    user: str | None = None,
    folder: Path | None = None,
    end_with: signal.Signals = signal.SIGTERM,
    grace_seconds: float = 10.0,
    children_first: bool = False,
) -> Server:
    """Starts a program in a session of its own, so that Ctrl-C reaches it only through `Server.end`.

    Args:
        name: What messages call it.
        command: Program and arguments.
        log: File that its output is appended to.
        environment: All of it; nothing is inherited.
        user: Under whose rights it runs; None: one's own. Only root can choose.
        folder: Its working directory.
        end_with: The signal that asks it to end.
        grace_seconds: How long it may take to, before it is killed.
        children_first: Interrupt what it started before it is asked to end itself.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"PYTHONUNBUFFERED": "1", **environment},
            cwd=folder,
            user=user,
            group=user and _group_of(user),
            extra_groups=None if user is None else [],
            start_new_session=True,
        )
    return Server(name, process, log, end_with, grace_seconds, children_first)


def program(name: str, install: str) -> str:
    """The path of a program: beside this Python, or on the PATH.

    Raises:
        NumpruneError: If it is nowhere; the message says what to `install`.
    """
    own = Path(sys.executable).parent
    found = shutil.which(name, path=os.pathsep.join([str(own), os.environ.get("PATH", "")]))
    if found is None:
        raise NumpruneError(f"the program {name} was not found: {install}.")
    return found


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def check_port(port: int, name: str) -> None:
    """Refuses a port that is taken.

    Raises:
        NumpruneError: If something listens there, which a health check would take for the new server.
    """
    with socket.socket() as connection:
        if connection.connect_ex((HOST, port)) == 0:
            raise NumpruneError(
                f"port {port} of {HOST}, meant for {name}, is taken: end what runs there or choose another."
            )


def answers(url: str) -> bool:
    """Whether a GET succeeds."""
    try:
        with urlopen(url, timeout=2) as answer:  # noqa: S310 - The URL is one of ours.
            return int(answer.status) == 200
    except (URLError, OSError):
        return False


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _ask_to_end(processes: list[psutil.Process], number: signal.Signals, grace_seconds: float) -> list[psutil.Process]:
    """Sends a signal to those that live; returns those that live on afterwards."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    left: list[psutil.Process] = psutil.wait_procs(processes, timeout=grace_seconds)[1]
    return left


def _group_of(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid
