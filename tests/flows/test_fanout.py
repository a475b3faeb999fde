"""Stages that wait for the same one run side by side on the workers of a Dask cluster."""

import json
import sys
from pathlib import Path

import pytest

from tests.flows.conftest import ROOT, Checkout, Server

pytestmark = pytest.mark.pipeline

# Neither budget is done before the other has begun.
PROGRAM = """
import json, os, sys, time
from pathlib import Path

from prefect import flow, task

from flows.fanout import stage_runner
from tasks.parameters import load_parameters


@task
def score(owner: str) -> None:
    pass


@task
def prune(own: Path, other: Path, owner: str) -> int:
    own.touch()
    deadline = time.monotonic() + 100
    while not other.exists():
        assert time.monotonic() < deadline, f"{other.name} has not begun."
        time.sleep(0.05)
    return os.getpid()


@flow
def both(folder: Path) -> list[int]:
    parameters = load_parameters(changes={"orchestration": {"runner": "dask", "workers": 2}})
    first, second = folder / "0.2", folder / "0.4"
    with stage_runner(parameters) as runner:
        needed = [runner.submit(score, {}, [])]
        budgets = [{"own": first, "other": second}, {"own": second, "other": first}]
        futures = [runner.submit(prune, budget, needed) for budget in budgets]
        return [future.result() for future in futures]


print(json.dumps(both(Path(sys.argv[1]))))
"""


def test_budgets_run_in_two_processes_at_the_same_time(prefect_server: Server, tmp_path: Path) -> None:
    done = Checkout(ROOT).run(sys.executable, "-c", PROGRAM, str(tmp_path), **prefect_server.environment)
    assert done.returncode == 0, done.stdout
    assert len(set(json.loads(done.stdout.splitlines()[-1]))) == 2
