"""Ctrl-C ends what a flow has started, wherever it runs."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.flows.conftest import MODEL, Checkout, Server

pytestmark = pytest.mark.pipeline


def running_in(root: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()) == root:
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.parametrize("runner", ["threads", "dask"])
def test_interrupt_ends_the_stage_and_leaves_nothing_half_written(
    checkout: Checkout, prefect_server: Server, runner: str
) -> None:
    def edit(content: dict) -> None:
        content["calibration"] |= {"data": "data/corpus/calibration.jsonl", "seed": 2}
        content["orchestration"]["runner"] = runner

    checkout.edit_parameters(edit)
    flow = checkout.start(sys.executable, "-m", "flows.compress", **prefect_server.environment)
    output = ""
    try:
        assert flow.stdout is not None
        for line in flow.stdout:
            output += line
            if "'corpus' - Finished" in line:
                while not any("tasks calibrate" in command for command in running_in(checkout.root)):
                    assert flow.poll() is None, output
                    time.sleep(0.05)
                os.killpg(flow.pid, signal.SIGINT)  # As a terminal does, workers of Dask included.
        assert flow.wait(30) == 130, output
    finally:
        flow.kill()
    assert "\nStopped." in output
    assert "Traceback" not in output
    assert list(checkout.root.rglob(".*.partial")) == []
    assert running_in(checkout.root) == []
    # DVC's lock is free again: it answers at once.
    assert f"calibrate@{MODEL}" in checkout.run("dvc", "status").stdout
