"""A copy of the repository with a tiny random model, in which the real pipeline runs."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MODEL = "tiny"
_FINISHED = re.compile(r"Task run '(?P<task>[^']+)' - Finished in state (?P<state>\w+)")


@dataclass(frozen=True)
class FlowRun:
    """What `python -m flows.compress` did."""

    code: int
    output: str

    @property
    def ended(self) -> dict[str, str]:
        """The state in which each task ended."""
        return {match["task"]: match["state"] for match in _FINISHED.finditer(self.output)}

    @property
    def ran(self) -> set[str]:
        """The kinds of stages that ran: `evaluate`, not `evaluate@tiny-0.5`."""
        return {
            task.partition("@")[0]
            for task, state in self.ended.items()
            if state == "Completed" and not task.startswith("publish@")
        }


@dataclass(frozen=True)
class Checkout:
    """A copy of the repository."""

    root: Path

    def compress(self, **variables: str) -> FlowRun:
        done = self.run(sys.executable, "-m", "flows.compress", **variables)
        return FlowRun(done.returncode, done.stdout)

    def run(self, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*command, **variables)
        try:
            output, _ = process.communicate(timeout=500)
        finally:
            process.kill()  # Does nothing to a process that has ended.
        return subprocess.CompletedProcess(command, process.returncode, output)

    def start(self, *command: str, **variables: str) -> "subprocess.Popen[str]":
        """Starts a command in a process group of its own; `variables` go to its environment."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "DVC_"))}
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**environment, "PATH": path, "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def edit_parameters(self, edit: Callable[[dict[str, Any]], None]) -> None:
        path = self.root / "params.yaml"
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        edit(content)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")

    def commit(self, message: str) -> None:
        """Commits everything."""
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        for command in (["add", "-A"], ["commit", "-qm", message]):
            subprocess.run(["git", *identity, *command], cwd=self.root, check=True)


def _tiny(content: dict[str, Any]) -> None:
    content["models"] = [MODEL]
    content["budgets"] = [0.2]
    content["recipe"] |= {"planning_tokens": 256}
    content["workload"] |= {"length": 64}
    content["corpus"] |= {"calibration": ["datasets"], "evaluation": ["huggingface_hub"], "questions": 20}
    content["calibration"] |= {"samples": 8, "length": 64}
    content["evaluation"] |= {"length": 64, "max_tokens": 2048}
    content["benchmark"] |= {"batches": [1], "prompt_lengths": [8], "new_tokens": 8, "repeats": 1}
    content["orchestration"] |= {"retries": 1}


def save_tiny_model(folder: Path, seed: int = 0) -> None:
    """A random LLaMA with grouped-query attention and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        # A sentence of a question fits, at one token a byte.
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def copy_repository(target: Path) -> Checkout:
    """Copies what git tracks or would track, with the changes of the moment, and makes it a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        # Results of the original are no results of the copy, and its models are not used.
        if name != "dvc.lock" and not name.startswith("models/") and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    save_tiny_model(target / "models" / MODEL)
    checkout = Checkout(target)
    checkout.edit_parameters(_tiny)
    subprocess.run(["git", "init", "-q"], cwd=target, check=True)
    checkout.commit("Copy")
    return checkout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return copy_repository(tmp_path_factory.mktemp("checkout"))


@dataclass(frozen=True)
class Watched:
    """A copy of the repository that watches a folder beside it."""

    checkout: Checkout
    drop: Path

    def release(self, name: str, seed: int = 0) -> None:
        """Puts a new model into the watched folder, as a whole."""
        folder = self.checkout.root.parent / f"{name}.partial"
        save_tiny_model(folder, seed)
        folder.rename(self.drop / name)

    @property
    def ledger(self) -> dict[tuple[str, str], tuple[str, str, str | None]]:
        """State, branch and error of every release."""
        with contextlib.closing(sqlite3.connect(self.checkout.root / ".numprune/ledger.db")) as database:
            rows = database.execute("SELECT name, revision, state, branch, error FROM releases")
            return {(name, revision): tuple(rest) for name, revision, *rest in rows}

    def versions(self) -> list[tuple[str, str]]:
        """Registered versions as model and budget."""
        database = self.checkout.root / "mlflow/mlflow.db"
        if not database.exists():
            return []
        with contextlib.closing(sqlite3.connect(database)) as connection:
            query = "SELECT name, value FROM model_version_tags WHERE key = 'budget'"
            return sorted(connection.execute(query).fetchall())


def watch_folder(target: Path) -> Watched:
    """A copy of the repository below `target`, and a folder it watches, with leases of a few seconds."""
    root, drop = target / "repository", target / "drop"
    root.mkdir()
    drop.mkdir()
    checkout = copy_repository(root)

    def edit(content: dict[str, Any]) -> None:
        content["watch"] |= {"sources": [{"kind": "folder", "path": str(drop)}]}
        content["watch"] |= {"settle_seconds": 0, "lease_seconds": 5}

    checkout.edit_parameters(edit)
    return Watched(checkout, drop)


@dataclass(frozen=True)
class Server:
    """A Prefect server with its services."""

    url: str
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PREFECT_API_URL": self.url,
            "PREFECT_HOME": str(self.home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }

    def logs(self) -> list[str]:
        """The messages of all runs."""
        request = urllib.request.Request(
            f"{self.url}/logs/filter", json.dumps({"limit": 200}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            return [line["message"] for line in json.load(response)]


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}/api", tmp_path_factory.mktemp("prefect"))
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (server.home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **server.environment}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while not _answers(server.url):
            assert time.monotonic() < deadline, (server.home / "server.log").read_text()
            assert process.poll() is None, (server.home / "server.log").read_text()
            time.sleep(0.5)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def kill_all(process: "subprocess.Popen[str]", *, descendants: bool = True) -> list[psutil.Process]:
    """Kills a process group with SIGKILL and, unless they are to outlive it, the groups of all it started.

    Returns:
        What outlives it.
    """
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if descendants:
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(started, timeout=10)
    return started
