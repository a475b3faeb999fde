"""Prefect's server, for as long as this process lives, where none is configured.

Prefect would start one in the first call of a flow. This one starts while this process still imports what the flow
needs, and this process need not import the server's code, as it must to start one in Prefect's way. It is the one of
`prefect server start`, on the database that Prefect's own would use.
"""

import atexit
import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

from numprune.errors import NumpruneError

_HOST = "127.0.0.1"
_GRACE_SECONDS = 10.0

# The server ends with the process that started it, even if that is killed.
_SERVE = """
import gc, os, runpy, signal, sys, threading
gc.set_threshold(50_000)
def end():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end, daemon=True).start()
sys.argv[1:] = ["server", "start", *sys.argv[1:]]
runpy.run_module("prefect", run_name="__main__")
"""


@functools.cache
def start_server() -> Callable[[], None]:
    """Starts a server, unless the environment names one.

    Returns:
        A function that waits until the server answers, and makes it Prefect's. It raises a NumpruneError if the server
        ended or did not answer in time.
    """
    if {"PREFECT_API_URL", "PREFECT_PROFILE"} & os.environ.keys():
        return lambda: None
    home = Path(os.environ["PREFECT_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    log = home / "server.log"
    port = _free_port()
    address = f"http://{_HOST}:{port}/api"
    environment = {
        **os.environ,
        # The page in the browser asks the address that it was told.
        "PREFECT_SERVER_UI_API_URL": address,
        # It delays the first answer, and nobody uses blocks of a server that is there for one run.
        "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, "--host", _HOST, "--port", str(port)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the flow, which then still says how it ended.
        )
    # Prefect sends the last of a run at the end of the process, in functions that are registered after this one.
    atexit.register(_end, process)

    def use() -> None:
        from prefect.context import refresh_global_settings_context
        from prefect.settings import get_current_settings

        configured = get_current_settings().api.url
        if configured is None:
            _wait(process, f"{address}/health", log)
            os.environ["PREFECT_API_URL"] = address
            refresh_global_settings_context()
        elif configured != address:  # A file names another, which is known only now that Prefect is imported.
            _end(process)

    return use


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    seconds = float(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"])
    deadline = time.monotonic() + seconds
    while not _answers(url):
        if process.poll() is not None:
            raise NumpruneError(f"Prefect's server ended with code {process.returncode}; {log} says more.")
        if time.monotonic() > deadline:
            raise NumpruneError(f"Prefect's server did not answer within {seconds:g} seconds; {log} may say more.")
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as answer:  # noqa: S310 - The URL is one of ours.
            return int(answer.status) == 200
    except OSError:
        return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
