"""Open Prefect's or MLflow's page on this machine: `python -m flows.web prefect|mlflow`."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from typing import Annotated, Literal

import typer

from flows.environment import prepare_environment
from numprune.errors import NumpruneError
from tasks.parameters import load_parameters
from tasks.step import run_step

HOST = "127.0.0.1"
PORTS = {"prefect": 4200, "mlflow": 5000}


def serve(page: Annotated[Literal["prefect", "mlflow"], typer.Argument()]) -> None:
    """Serves a page until Ctrl-C and opens it in the browser, if there is one."""
    prepare_environment()
    registry = load_parameters().registry
    if page == "mlflow" and registry.tracking_uri.startswith("http"):
        raise NumpruneError(f"registry.tracking_uri is a server with a page of its own: open {registry.tracking_uri}.")
    port = PORTS[page]
    if _answers(port):
        raise NumpruneError(f"port {port} of {HOST} is taken: open http://{HOST}:{port} or end what runs there.")
    command = [sys.executable, "-m", page]
    if page == "prefect":
        command += ["server", "start", "--host", HOST, "--port", str(port)]
    else:
        command += ["server", "--host", HOST, "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", registry.tracking_uri]
    print(f"http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
    if _has_display():
        threading.Thread(target=_open_when_up, args=(port,), daemon=True).start()
    # Ctrl-C reaches the server as well, because it is in the same process group; other ends are passed on.
    with subprocess.Popen(command) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.terminate())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        server.wait()
    sys.exit(max(server.returncode, 0))


def _has_display() -> bool:
    """Without one, `webbrowser` would start a browser in the terminal."""
    return sys.platform != "linux" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


def _open_when_up(port: int) -> None:
    for _ in range(120):
        if _answers(port):
            webbrowser.open(f"http://{HOST}:{port}")
            return
        time.sleep(0.5)


def _answers(port: int) -> bool:
    with socket.socket() as connection:
        connection.settimeout(0.5)
        return connection.connect_ex((HOST, port)) == 0


if __name__ == "__main__":
    run_step(serve)
