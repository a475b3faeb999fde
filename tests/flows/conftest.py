"""A copy of the repository with a tiny random model, in which the real pipeline runs."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def compress(self) -> FlowRun:
        done = self.run(sys.executable, "-m", "flows.compress")
        return FlowRun(done.returncode, done.stdout)

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*command)
        try:
            output, _ = process.communicate(timeout=500)
        finally:
            process.kill()  # Does nothing to a process that has ended.
        return subprocess.CompletedProcess(command, process.returncode, output)

    def start(self, *command: str) -> "subprocess.Popen[str]":
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "DVC_"))}
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**environment, "PATH": path, "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def edit_parameters(self, edit: Callable[[dict[str, Any]], None]) -> None:
        path = self.root / "params.yaml"
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        edit(content)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")


def _tiny(content: dict[str, Any]) -> None:
    content["models"] = [MODEL]
    content["budgets"] = [0.2]
    content["recipe"] |= {"planning_samples": 4}
    content["workload"] |= {"length": 64}
    content["corpus"] |= {"calibration": ["datasets"], "evaluation": ["huggingface_hub"], "questions": 20}
    content["calibration"] |= {"samples": 8, "length": 64}
    content["evaluation"] |= {"length": 64, "max_tokens": 2048}
    content["benchmark"] |= {"batches": [1], "prompt_lengths": [8], "new_tokens": 8, "repeats": 1}
    # Two workers also show that stages may run side by side.
    content["orchestration"] |= {"workers": 2, "retries": 1}


def save_tiny_model(folder: Path) -> None:
    """A random LLaMA with grouped-query attention and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
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
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "Copy"]):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        subprocess.run(["git", *identity, *command], cwd=target, check=True)
    return checkout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return copy_repository(tmp_path_factory.mktemp("checkout"))
