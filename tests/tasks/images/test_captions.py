"""The steps of the pipeline on a tiny image model that is conditioned on captions."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from numprune.images import images_drawn, prompts_of_all
from numprune.llamagen import LlamaGenConfig
from numprune.samples import fingerprint, load_samples, save_samples
from tasks.calibrate import calibrate
from tasks.capture import capture
from tasks.compensate import compensate
from tasks.digits import digits
from tasks.evaluate import evaluate
from tasks.layout import calibration_file, checkpoint_folder, evaluation_file, plan_file
from tasks.prune import prune
from tasks.score import score
from tests.numprune.conftest import random_model

ROOT = Path(__file__).parents[3]
MODEL, BUDGET = "tiny", "0.3"


def test_a_model_of_captions_goes_through_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    captions = {"num_classes": None, "caption_dim": 6, "condition_tokens": 3}
    config = LlamaGenConfig(**sizes, **heads, **captions, codebook_size=17, grid_size=8)
    folder = Path("models") / MODEL
    random_model(config).save_pretrained(folder)
    features = torch.randn(4, 3, 6)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]])
    save_file({"caption_features": features, "attention_mask": mask}, folder / "captions.safetensors")
    held_out = prompts_of_all(config, folder, 6)
    drawn = torch.cat([held_out.input_ids, torch.randint(17, (6, 64))], dim=1)
    save_samples(images_drawn(drawn, held_out), tmp_path / "held_out.safetensors")
    (tmp_path / "evaluation").symlink_to(ROOT / "evaluation")
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content |= {"models": [MODEL], "budgets": [BUDGET]}
    content["images"] |= {"calibration_per_condition": 5, "samples": 20, "batch_size": 10, "guidance_scale": 1.5}
    content["images"]["data"] = "held_out.safetensors"
    Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    digits()
    for step in (calibrate, capture, score, evaluate):
        step(MODEL)
    for step in (prune, compensate, evaluate):
        step(MODEL, BUDGET)
    samples = load_samples(calibration_file(MODEL))
    assert samples.input_ids.shape == (20, 67)
    assert torch.equal(samples.inputs["caption_features"], features.repeat(5, 1, 1))
    assert torch.equal(samples.inputs["attention_mask"][1], torch.arange(67) >= 1)
    plan = json.loads(plan_file(MODEL, BUDGET).read_text(encoding="utf-8"))
    assert plan["source"]["calibration"] == fingerprint(samples)
    kept = load_samples(checkpoint_folder(MODEL, BUDGET) / "calibration" / "input_ids.safetensors")
    assert fingerprint(kept) == fingerprint(samples)
    for budget in (None, BUDGET):
        found = json.loads(evaluation_file(MODEL, budget).read_text(encoding="utf-8"))
        assert found["protocol"]["windows"] == 6
        assert found["perplexity"] > 1
        assert found["images"]["fid"] > 1
