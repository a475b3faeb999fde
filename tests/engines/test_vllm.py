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


NOT_ITS_OWN = ("qwen2", "uniform")
# Its attention splits the fused projection by the head count of the configuration, which vLLM reads from the whole one.
REFUSED = ("phi3", "ragged")


def options(cell: tuple[str, str]) -> dict[str, str]:
    return BACKEND if cell == NOT_ITS_OWN else {}


@pytest.fixture(scope="module")
def families(prune, tmp_path_factory):
    """Folder and what vLLM gives, for every family and shape."""
    folders = {cell: prune(FAMILIES[cell[0]], cell[1]) for cell in CELLS}
    jobs = [job(folder, **options(cell)) for cell, folder in folders.items()]
    answers = run(jobs, tmp_path_factory.mktemp("vllm"))
    return {cell: (folder, answer) for (cell, folder), answer in zip(folders.items(), answers, strict=True)}


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_same_tokens_for_a_batch_of_mixed_lengths(families, record, cell):
    folder, answer = families[cell]
    if cell == REFUSED:
        assert "AmbiguousGlobalPerLayerAttributeError" in answer["error"]
        record(cell[0], "vLLM", cell[1], "no")
        return
    model = reference(folder)
    assert answer == {"tokens": [greedy(model, prompt) for prompt in PROMPTS]}
    record(cell[0], "vLLM", cell[1], "with `--model-impl transformers`" if options(cell) else "yes")
