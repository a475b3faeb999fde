"""The Prefect server that a run starts where none is configured."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from flows.server import _answers, start_server
from numprune.errors import NumpruneError
from tests.flows.conftest import ROOT

pytestmark = pytest.mark.pipeline

PROGRAM = """
import os, sys
from flows.environment import prepare_environment
prepare_environment()
from flows.server import start_server
use_server = start_server()
use_server()
from prefect import flow
flow(name="nothing")(lambda: None)() if "PREFECT_API_URL" in os.environ else None
print(os.environ.get("PREFECT_API_URL"), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def started(folder: Path) -> Iterator["tuple[subprocess.Popen[str], str]"]:
    """A process that has started a server, and what it says of its address."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("killed", [False, True])
def test_it_keeps_the_history_of_the_run_and_ends_with_its_process(tmp_path: Path, killed: bool) -> None:
    with started(tmp_path) as (process, address):
        assert _answers(f"{address}/health")
        with urlopen(address.replace("/api", "/ui-settings"), timeout=10) as settings:
            assert json.load(settings)["api_url"] == address
        (server,) = psutil.Process(process.pid).children()
        if killed:
            process.send_signal(signal.SIGKILL)
            assert psutil.wait_procs([server], timeout=30)[1] == []
        else:
            process.communicate("", timeout=30)
            assert process.returncode == 0
            assert not server.is_running()
    with contextlib.closing(sqlite3.connect(tmp_path / ".prefect/prefect.db")) as database:
        assert database.execute("SELECT state_type FROM flow_run").fetchall() == [("COMPLETED",)]


def test_there_is_none_where_a_file_names_another(tmp_path: Path) -> None:
    (tmp_path / "prefect.toml").write_text('[api]\nurl = "http://127.0.0.1:1/api"\n', encoding="utf-8")
    with started(tmp_path) as (process, address):
        assert address == "None"
        assert psutil.Process(process.pid).children() == []


def test_one_that_cannot_start_is_said_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "60")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{tmp_path}/none/prefect.db")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    with pytest.raises(NumpruneError, match=r"ended with code .*server\.log says more"):
        start_server.__wrapped__()()  # Not the one that this process may have.
    assert "unable to open database file" in (tmp_path / "home/server.log").read_text(encoding="utf-8")
