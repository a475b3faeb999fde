"""Run a module as a program in a process that is forked off the fork server, where there is one.

`python -m tasks.forked MODULE ARGUMENTS` passes on arguments, environment, working directory, standard streams, signals
and the exit code; see `tasks.forkserver`. Without a fork server it is `python -m MODULE ARGUMENTS`. What is imported
here is paid by every stage.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypedDict

# Environment variable: the socket of the fork server.
SOCKET = "NUMPRUNE_FORK_SERVER"
STREAMS = (0, 1, 2)
# What a forked process says first.
FORKED = b"+"

_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
# What a shell says of a process that was killed.
_KILLED = 128 + signal.SIGKILL


class Request(TypedDict):
    """What is to run, as a line of JSON; the standard streams come before it, as descriptors."""

    module: str
    arguments: list[str]
    folder: str
    environment: dict[str, str]


def run(module: str, arguments: Sequence[str]) -> NoReturn:
    """Runs a module as a program and ends as it ends.

    Args:
        module: Its name, as after `python -m`.
        arguments: Of the program.
    """
    connection = _connect()
    code = None if connection is None else _run_there(connection, module, arguments)
    if code is None:
        run_here(module, arguments)
    sys.exit(code)


def run_here(module: str, arguments: Sequence[str]) -> NoReturn:
    """Runs a module as the program of this process."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


def _connect() -> socket.socket | None:
    path = os.environ.get(SOCKET)
    if path is None:
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:  # The process that started it was killed; what runs under it goes on.
        connection.close()
        return None
    return connection


def _run_there(connection: socket.socket, module: str, arguments: Sequence[str]) -> int | None:
    """The exit code of a forked process; None if there was none."""
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        with contextlib.suppress(OSError):
            connection.send(bytes([number]))

    request = Request(module=module, arguments=list(arguments), folder=str(Path.cwd()), environment=dict(os.environ))
    handlers = {}
    try:
        socket.send_fds(connection, [b"\n"], STREAMS)
        connection.sendall(json.dumps(request).encode() + b"\n")
        # Not before: the number of a signal would end up in the middle of the request.
        handlers = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
        if connection.recv(1) == FORKED:
            code = connection.recv(1)
            connection.recv(1)  # Nothing more comes; this waits for the end of the process.
            return code[0] if code else _KILLED
    except ConnectionError:
        pass
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if received:  # Nobody took it, and nothing shall begin now.
        signal.raise_signal(received[0])
    return None


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
