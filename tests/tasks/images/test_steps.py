"""Every step of the pipeline on a tiny image model, one after the other, as the stages run them."""

import base64
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from numprune.llamagen import LlamaGenConfig
from tasks.benchmark import benchmark
from tasks.calibrate import calibrate
from tasks.capture import capture
from tasks.compensate import compensate
from tasks.digits import digits
from tasks.evaluate import evaluate
from tasks.images.digits import GREY_LEVELS, load_digits, split
from tasks.layout import (
    DIGITS,
    benchmark_file,
    calibration_file,
    checkpoint_folder,
    comparison_file,
    evaluation_file,
    report_page,
)
from tasks.parameters import load_parameters
from tasks.prune import prune
from tasks.registry.figures import metrics
from tasks.score import score
from tasks.summary import summarise
from tests.numprune.conftest import random_model

ROOT = Path(__file__).parents[3]
MODEL, BUDGET = "tiny", "0.3"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory):
    """A working directory after all steps."""
    root = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        config = LlamaGenConfig(**sizes, **heads, codebook_size=17, grid_size=8, num_classes=10)
        random_model(config).save_pretrained(Path("models") / MODEL)
        (root / "evaluation").symlink_to(ROOT / "evaluation")
        content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        content |= {"models": [MODEL], "budgets": [BUDGET]}
        content["images"] |= {"calibration_per_condition": 4, "samples": 60, "batch_size": 50, "guidance_scale": 1.5}
        content["evaluation"]["max_tokens"] = 65 * 20
        content["benchmark"] |= {"batches": [1], "repeats": 1}
        Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        digits()
        for step in (calibrate, capture, score, evaluate):
            step(MODEL)
        for step in (prune, compensate, evaluate, benchmark):
            step(MODEL, BUDGET)
        summarise()
        yield root


@pytest.fixture(autouse=True)
def _inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_calibration_images_are_of_all_classes_in_turn() -> None:
    input_ids = load_file(calibration_file(MODEL))["input_ids"]
    assert input_ids.shape == (40, 65)
    assert torch.equal(input_ids[:, 0], GREY_LEVELS + torch.arange(40, dtype=input_ids.dtype) % 10)
    assert input_ids[:, 1:].max() < GREY_LEVELS


def test_the_pruned_model_is_smaller_and_writes_images() -> None:
    dense, pruned = (
        AutoModelForCausalLM.from_pretrained(folder)
        for folder in (Path("models") / MODEL, checkpoint_folder(MODEL, BUDGET))
    )
    assert type(pruned) is type(dense)
    assert pruned.num_parameters() < dense.num_parameters()
    prompt = torch.tensor([[GREY_LEVELS + 3]])
    assert pruned.generate(prompt, guidance_scale=2.0, max_new_tokens=64, pad_token_id=0).shape == (1, 65)


def test_images_are_measured_and_shown() -> None:
    dense, pruned = read(evaluation_file(MODEL, None)), read(evaluation_file(MODEL, BUDGET))
    for found in (dense, pruned):
        assert found["images"]["fid"] > 1  # Noise.
        assert 0 <= found["images"]["precision"] <= 1
        assert found["protocol"]["windows"] == 20
        assert found["tasks"] == {}
    documents = {"plan.json": {"achieved_ratio": 0.3}, "benchmark.json": read(benchmark_file(MODEL, BUDGET))}
    logged = metrics(documents | {"evaluation.json": pruned, "dense/evaluation.json": dense})
    assert (logged["fid"], logged["dense_fid"]) == (pruned["images"]["fid"], dense["images"]["fid"])
    shown = read(comparison_file(MODEL, BUDGET))["images"]
    page = report_page(MODEL, BUDGET).read_text(encoding="utf-8")
    for side in ("dense", "pruned"):
        assert base64.b64decode(shown[side]).startswith(b"\x89PNG")
        assert shown[side] in page
    assert "Inception score" in page
    assert "| images | removed | FID | sFID |" in Path("report/summary.md").read_text(encoding="utf-8")


def test_the_workload_is_a_whole_image() -> None:
    protocol = read(benchmark_file(MODEL, BUDGET))["protocol"]
    assert (protocol["prompt_length"], protocol["new_tokens"]) == (1, 64)


def test_held_out_digits_are_not_trained_on() -> None:
    training = load_parameters(ROOT / "params.yaml").reference_images.training
    pixels, classes = load_digits()
    chosen, held_out = split(classes, training.held_out, seed=training.seed)
    assert set(chosen.tolist()) | set(held_out.tolist()) == set(range(len(pixels)))
    assert len(chosen) + len(held_out) == len(pixels)
    stored = load_file(DIGITS / "held_out.safetensors")["input_ids"]
    assert torch.equal(stored[:, 1:].long(), pixels[held_out])
    assert torch.equal(stored[:, 0].long() - GREY_LEVELS, classes[held_out])
