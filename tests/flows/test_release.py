"""Releases that are killed, with a real Prefect server, DVC, and MLflow on SQLite."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.flows.conftest import Server, Watched, kill_all, watch_folder

pytestmark = pytest.mark.pipeline

PREFECT = (sys.executable, "-m", "prefect")
WATCH = (sys.executable, "-m", "flows.watch")


def git(watched: Watched, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=watched.checkout.root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def check_record(watched: Watched, name: str, tmp_path: Path) -> None:
    """That the branch of a release holds one commit from which DVC finds every result."""
    ((_, revision),) = [key for key in watched.ledger if key[0] == name]
    state, branch, _ = watched.ledger[name, revision]
    assert state == "done"
    assert branch == f"release/{name}/{revision[:12]}"
    assert git(watched, "log", "--format=%s", f"master..{branch}") == f"Compress {name} {revision[:12]} at 0.2"
    assert git(watched, "worktree", "list").count("\n") == 0
    assert list((watched.checkout.root / ".numprune/worktrees").iterdir()) == []
    again = tmp_path / "again"
    git(watched, "worktree", "add", "-q", str(again), branch)
    try:
        for command in (
            ["cache", "dir", "--local", str(watched.checkout.root / ".dvc/cache")],
            ["checkout", "dvc.yaml"],
        ):
            subprocess.run([sys.executable, "-m", "dvc", *command], cwd=again, check=True, capture_output=True)
        status = subprocess.run(
            [sys.executable, "-m", "dvc", "status", "dvc.yaml"], cwd=again, capture_output=True, text=True, check=True
        )
        assert "up to date" in status.stdout, status.stdout
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=again, capture_output=True, text=True, check=True
        )
        assert changed.stdout == ""
        parameters = yaml.safe_load((again / "params.yaml").read_text(encoding="utf-8"))
        assert parameters["models"] == [name]
        assert parameters["downloads"][name]["revision"] == revision
        assert list(again.rglob(".*.partial")) == []
    finally:
        git(watched, "worktree", "remove", "--force", str(again))


# What the run has said last, and up to how many seconds later it is killed. The work of a killed run is not lost, so
# that later kills fall on later steps.
MOMENTS = (
    ("", 4.0),
    ("for flow 'release'", 1.0),
    ("for flow 'stages'", 6.0),
    ("for flow 'stages'", 8.0),
    ("'capture@crash' - Finished", 4.0),
    ("'prune@crash-0.2' - Finished", 5.0),
    ("'benchmark@crash-0.2' - Finished", 3.0),
    ("'summary' - Finished", 0.3),
    ("'commit' - Finished", 0.2),
    ("'push' - Finished", 3.0),
)


def test_killed_at_ten_moments_it_ends_consistent(prefect_server: Server, tmp_path: Path) -> None:
    watched = watch_folder(tmp_path)
    watched.release("crash")
    chance = random.Random(0)
    orphans: list[psutil.Process] = []
    killed = 0
    try:
        for number, (said, within) in enumerate(MOMENTS):
            run = watched.checkout.start(*WATCH, "--here", **prefect_server.environment)
            timer = threading.Timer(120, os.killpg, (run.pid, signal.SIGKILL))
            timer.start()
            assert run.stdout is not None
            output = ""
            while said not in output and (line := run.stdout.readline()):
                output += line
            assert said in output, output
            time.sleep(chance.uniform(0, within))
            timer.cancel()
            killed += run.poll() is None
            # Every other time, stages outlive the run that started them, as they do when only it is killed.
            orphans += kill_all(run, descendants=number % 2 == 0)
            assert len(watched.versions()) <= 1
    finally:
        for orphan in orphans:
            try:
                orphan.kill()
            except psutil.NoSuchProcess:
                continue
    assert killed == len(MOMENTS)
    done = watched.checkout.run(*WATCH, "--here", **prefect_server.environment)
    assert done.returncode == 0, done.stdout
    assert watched.versions() == [("crash", "0.2")]
    check_record(watched, "crash", tmp_path)
    # And once more: there is nothing to do.
    done = watched.checkout.run(*WATCH, "--here", **prefect_server.environment)
    assert done.returncode == 0, done.stdout
    assert "release" not in done.stdout.replace("numprune.release", "")
    assert watched.versions() == [("crash", "0.2")]
