"""Pruned models in vLLM itself, which runs in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from numprune.architectures import decoder_blocks
from numprune.card import how_to_load
from numprune.ragged import remove_attention, remove_mlp
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


def options(cell: tuple[str, str]) -> dict[str, str]:
    return BACKEND if cell == NOT_ITS_OWN else {}


def without_mlp(model: Any) -> Any:
    remove_mlp(decoder_blocks(model)[1], "mlp.down_proj", ())
    return model


def without_attention(model: Any) -> Any:
    remove_attention(decoder_blocks(model)[1], "self_attn", 32)
    return model


@pytest.fixture(scope="module")
def families(prune, tmp_path_factory):
    """Folder and what vLLM gives, for every family and shape, and for models that lack a whole module."""
    folders = {cell: prune(FAMILIES[cell[0]], cell[1]) for cell in CELLS}
    folders |= {change: prune(FAMILIES["llama"], "ragged", change) for change in (without_mlp, without_attention)}
    jobs = [job(folder, **options(cell)) for cell, folder in folders.items()]
    answers = run(jobs, tmp_path_factory.mktemp("vllm"))
    return {cell: (folder, answer) for (cell, folder), answer in zip(folders.items(), answers, strict=True)}


def expected(folder: Path) -> dict[str, Any]:
    model = reference(folder)
    return {"tokens": [greedy(model, prompt) for prompt in PROMPTS]}


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_same_tokens_for_a_batch_of_mixed_lengths(families, record, cell):
    folder, answer = families[cell]
    assert answer == expected(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert ("--model-impl transformers" in how_to_load(config, "out")) == bool(options(cell))
    record(cell[0], "vLLM", cell[1], "with `--model-impl transformers`" if options(cell) else "yes")


def test_an_mlp_may_be_gone_and_an_attention_is_missed(families):
    folder, answer = families[without_mlp]
    assert answer == expected(folder)
    assert (
        "Layer 1 does not dispatch through the Transformers attention interface"
        in families[without_attention][1]["error"]
    )


def test_two_processes_share_the_heads_of_every_layer(prune, tmp_path):
    """Tensor parallelism over widths that differ, all of them even."""
    folder = prune(FAMILIES["llama"], "even")
    cores = sorted(os.sched_getaffinity(0))
    bound = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    assert run([job(folder, tensor_parallel_size=2)], tmp_path, **bound) == [expected(folder)]
