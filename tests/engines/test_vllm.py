"""Pruned models in vLLM itself, which runs in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import CELLS, FAMILIES, PROMPTS, TOKENS, greedy, reference

pytestmark = pytest.mark.engines

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".venv-vllm/bin"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# vLLM's own class takes the channels of a head from the head count: its backend for transformers does not.
BACKEND = {"model_impl": "transformers"}


def run(jobs: list[dict[str, Any]], folder: Path, **environment: str) -> list[dict[str, Any]]:
    """What vLLM gives for each job, in one process."""
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [BIN / "python", ROOT / "tests/engines/vllm_generate.py", folder / "jobs.json", folder / "answers.json"]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT | environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert (folder / "answers.json").exists(), done.stderr[-3000:]
    answers: list[dict[str, Any]] = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return answers


def job(folder: Path, prompts: list[list[int]] = PROMPTS, **options: Any) -> dict[str, Any]:
    return {"folder": str(folder), "prompts": prompts, "tokens": TOKENS, "length": 128, "options": options}


@pytest.fixture(scope="module")
def families(prune, tmp_path_factory):
    """What vLLM gives for every family and shape, with its own class and, if that fails, with its backend."""
    folders = {cell: prune(FAMILIES[cell[0]], cell[1]) for cell in CELLS}
    jobs = [job(folder, **options) for folder in folders.values() for options in ({}, BACKEND)]
    answers = iter(run(jobs, tmp_path_factory.mktemp("vllm")))
    return {cell: (folder, next(answers), next(answers)) for cell, folder in folders.items()}


@pytest.mark.parametrize(("name", "shape"), CELLS)
def test_same_tokens_in_every_family(families, record, name, shape):
    folder, own, backend = families[name, shape]
    model = reference(folder)
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    print(
        name,
        shape,
        own.get("error", own.get("tokens") == expected),
        backend.get("error", backend.get("tokens") == expected),
    )
    assert expected in (own.get("tokens"), backend.get("tokens")), (own, backend)
    record(name, "vLLM", shape, "yes" if own.get("tokens") == expected else "with `--model-impl transformers`")
