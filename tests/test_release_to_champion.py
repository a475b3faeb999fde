"""From a checkpoint dropped into a watched folder to a champion: PostgreSQL, S3, MLflow, Prefect and its worker.

The tests go through the life of one registry, in the order in which they stand here.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from infra.servers import Servers, deploy, servers
from tests.flows.conftest import ROOT, Checkout, copy_repository

pytestmark = pytest.mark.servers

MODEL = "llama"
PROGRAMS = Path(sys.executable).parent
# One release takes a minute or two on two cores.
PATIENCE = 420.0


@dataclass(frozen=True)
class Team:
    """A checkout, the servers, and the folder that is watched."""

    checkout: Checkout
    servers: Servers
    releases: Path
    registry: MlflowClient

    def drop(self, noise: float) -> None:
        """Puts a revision of the reference model into the watched folder, its weights disturbed by so much."""
        source, arriving = ROOT / "models/reference-llama", self.releases.parent / "arriving"
        shutil.copytree(source, arriving)
        weights = load_file(source / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        for name, tensor in weights.items():
            scale = noise * tensor.float().std()
            weights[name] = (tensor + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        save_file(weights, arriving / "model.safetensors", {"format": "pt"})
        shutil.rmtree(self.releases / MODEL, ignore_errors=True)
        arriving.rename(self.releases / MODEL)

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, **self.servers.environment}
        return subprocess.run(
            [PROGRAMS / "numprune", *command],
            cwd=self.checkout.root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def alias(self, alias: str) -> int | None:
        models = self.registry.search_registered_models(f"name = '{MODEL}'")
        version = dict(models[0].aliases).get(alias) if models else None
        return None if version is None else int(version)

    def flow_runs(self) -> list[dict[str, Any]]:
        from httpx import post

        url = f"{self.servers.prefect}/flow_runs/filter"
        runs: list[dict[str, Any]] = post(url, json={"sort": "START_TIME_ASC"}, timeout=30).json()
        return runs

    def log(self, server: str) -> str:
        return (self.servers.folder / f"{server}.log").read_text(encoding="utf-8")[-10_000:]

    def wait(self, what: str, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until():
            runs = self.flow_runs()
            failed = [run for run in runs if run["state_name"] in {"Failed", "Crashed", "Rejected"}]
            messages = [f"{run['name']}: {run['state']['message']}" for run in failed]
            assert not failed, "\n".join([*messages, self.log("worker")])
            assert time.monotonic() < deadline, f"{what} did not come to pass\n{self.log('worker')}"
            time.sleep(2)


def _parameters(content: dict[str, Any]) -> None:
    content["recipe"] |= {"planning_tokens": 512}
    content["calibration"] |= {"samples": 16, "length": 128}
    content["evaluation"] |= {"length": 128, "max_tokens": 8192, "tasks": []}
    # Rather than the noise of this machine's clock, quality decides.
    content["promotion"] |= {"max_perplexity": 60.0, "max_perplexity_ratio": 1.5, "undominated": False}


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    if shutil.which("initdb") is None:
        pytest.skip("PostgreSQL is not installed: `apt-get install postgresql` and put its programs into PATH")
    # PostgreSQL runs as another user where the tests run as root, and pytest's folders are closed to others.
    folder = Path(tempfile.mkdtemp(prefix="numprune-"))
    folder.chmod(0o755)
    checkout = copy_repository(folder / "checkout")
    releases = folder / "releases"
    releases.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with servers(folder / "servers", postgres=True, s3=True, worker=True, root=checkout.root) as running:
            _configure(checkout, running, releases)
            for name, value in running.environment.items():
                patch.setenv(name, value)
            deploy(running, checkout.root)
            yield Team(checkout, running, releases, MlflowClient(running.mlflow))
    shutil.rmtree(folder)


def _configure(checkout: Checkout, running: Servers, releases: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        _parameters(content)
        content["registry"]["tracking_uri"] = running.mlflow
        content["watch"] |= {
            "sources": [{"kind": "folder", "path": str(releases)}],
            "settle_seconds": 0,
        }

    checkout.edit_parameters(edit)
    path = checkout.root / "prefect.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for deployment in content["deployments"]:
        if deployment["name"] == "watch":
            deployment["schedules"] = [{"interval": 30}]
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    checkout.run("git", "remote", "add", "origin", "https://example.invalid/numprune.git")
    for command in (
        ["dvc", "remote", "add", "--local", "--default", "storage", "s3://dvc"],
        ["dvc", "remote", "modify", "--local", "storage", "endpointurl", running.environment["AWS_ENDPOINT_URL_S3"]],
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.invalid", "commit", "-qam", "Parameters of the team"],
    ):
        done = checkout.run(*command)
        assert done.returncode == 0, done.stdout


def test_dropped_checkpoint_becomes_a_verified_champion(team: Team) -> None:
    team.drop(noise=0.0)
    team.wait("the first champion", lambda: team.alias("champion") == 1)
    done = team.run("verify", f"{MODEL}@champion")
    assert done.returncode == 0, done.stdout + done.stderr
    said = team.run("lineage", f"{MODEL}@champion")
    assert said.returncode == 0, said.stderr
    # The record is a commit on a branch of its own; the checkout itself is as it was.
    log = team.checkout.run("git", "log", "--all", "--format=%s").stdout
    assert f"Compress {MODEL} " in log
    assert team.checkout.run("git", "status", "--porcelain").stdout == ""
    storage = boto3.client("s3", endpoint_url=team.servers.environment["AWS_ENDPOINT_URL_S3"])
    assert storage.list_objects_v2(Bucket="dvc")["KeyCount"] > 5


def test_good_revision_is_the_next_champion(team: Team) -> None:
    team.drop(noise=1e-3)
    team.wait("the second champion", lambda: team.alias("champion") == 2)
    assert team.alias("previous") == 1


def test_worse_revision_is_refused(team: Team) -> None:
    team.drop(noise=0.7)
    team.wait("the candidate", lambda: team.alias("candidate") == 3)
    team.wait("its refusal", lambda: any(run["state_name"] == "Refused" for run in team.flow_runs()))
    assert team.alias("champion") == 2
    done = team.run("promote", MODEL)
    assert done.returncode == 1
    assert "perplexity" in done.stdout
    assert team.alias("champion") == 2


def test_rollback(team: Team) -> None:
    done = team.run("rollback", MODEL, "--reason", "an example")
    assert done.returncode == 0, done.stdout + done.stderr
    assert team.alias("champion") == 1
    assert team.run("verify", f"{MODEL}@champion").returncode == 0
    # Nobody compresses again what has been compressed.
    watched = [run for run in team.flow_runs() if run["name"].startswith(f"{MODEL}@")]
    assert len(watched) == 3
