"""A small random LlamaGen that is conditioned on captions: calibrated, measured and pruned with their features."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from numprune.architectures import decoder_blocks, linear, prunable_groups
from numprune.capture import capture
from numprune.cli import app
from numprune.errors import NumpruneError
from numprune.llamagen import LlamaGenConfig
from numprune.perplexity import perplexity, scored_tokens, window_losses
from numprune.reconstruction import hidden_state_errors
from numprune.samples import Samples, fingerprint, load_samples, save_samples
from numprune.sensitivity import LossProbe
from tests.numprune.conftest import random_model
from tests.numprune.test_llamagen import SMALL

CONFIG = LlamaGenConfig(**SMALL, num_classes=None, caption_dim=20, condition_tokens=5)
CONDITION, TOKENS = 5, 16
CPU = torch.device("cpu")


@pytest.fixture
def model() -> PreTrainedModel:
    return random_model(CONFIG).double()


@pytest.fixture
def samples() -> Samples:
    """Twelve images with captions of one to five tokens, no two batches of five padded alike."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(CONFIG.codebook_size, (12, TOKENS), generator=generator)
    input_ids = torch.cat([torch.full((12, CONDITION), CONFIG.codebook_size), tokens], dim=1)
    words = torch.arange(12) % CONDITION + 1
    mask = torch.arange(CONDITION + TOKENS) >= CONDITION - words[:, None]
    # What stands at padding is noise that must not count.
    features = torch.randn(12, CONDITION, 20, generator=generator, dtype=torch.float64)
    return Samples(input_ids, {"caption_features": features, "attention_mask": mask})


def alone(samples: Samples, index: int) -> dict[str, Tensor]:
    """Arguments of an ordinary forward pass of one sample."""
    sample = samples[index : index + 1]
    return {"input_ids": sample.input_ids, **sample.inputs}


def consumer_inputs(model: PreTrainedModel, samples: Samples) -> dict[str, Tensor]:
    """What enters every consumer at tokens that are no padding, sample after sample."""
    seen: dict[str, list[Tensor]] = {}
    for block, groups in zip(decoder_blocks(model), prunable_groups(model), strict=True):
        for group in groups:

            def keep(_module: Any, inputs: tuple[Tensor, ...], name: str = group.name) -> None:
                seen.setdefault(name, []).append(inputs[0][0])

            linear(block, group.consumer).register_forward_pre_hook(keep)
    with torch.no_grad():
        for index in range(len(samples)):
            model(**alone(samples, index))
    masks = samples.inputs["attention_mask"]
    return {
        name: torch.cat([rows[mask] for rows, mask in zip(found, masks, strict=True)]) for name, found in seen.items()
    }


def test_moments_are_those_of_each_image_by_itself_without_padding(model: PreTrainedModel, samples: Samples) -> None:
    found = {name: m for block in capture(model, samples, batch_size=5) for name, m in block.moments.items()}
    expected = consumer_inputs(model, samples)
    for name, rows in expected.items():
        assert found[name].count == len(rows) == int(samples.inputs["attention_mask"].sum())
        torch.testing.assert_close(found[name].gram, rows.T @ rows, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[name].mean, rows.mean(0), rtol=1e-9, atol=1e-9)


def test_features_make_a_difference_and_those_at_padding_none(model: PreTrainedModel, samples: Samples) -> None:
    def grams(changed: Tensor) -> Tensor:
        inputs = samples.inputs | {"caption_features": changed}
        return next(capture(model, Samples(samples.input_ids, inputs))).moments["0.mlp"].gram

    features = samples.inputs["caption_features"]
    padding = ~samples.inputs["attention_mask"][:, :CONDITION, None]
    own = grams(features)
    torch.testing.assert_close(grams(features.masked_fill(padding, 9.0)), own, rtol=1e-12, atol=1e-12)
    assert (grams(features.flip(0)) - own).norm() > 1e-3 * own.norm()


@torch.no_grad()
def test_the_loss_is_that_of_image_tokens(model: PreTrainedModel, samples: Samples) -> None:
    losses = torch.cat(list(window_losses(model, samples, batch_size=5)))
    expected = []
    for index in range(12):
        given = alone(samples, index)
        scores = model(**given).logits[0, CONDITION - 1 : -1].log_softmax(-1)
        expected.append(-scores.gather(1, given["input_ids"][0, CONDITION:, None]).sum())
    # The log-probabilities are in float32.
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert scored_tokens(model, samples) == 12 * TOKENS
    measured = perplexity(losses, samples.length, scored=scored_tokens(model, samples))
    assert measured.perplexity == pytest.approx((losses.sum() / (12 * TOKENS)).exp().item())


@torch.no_grad()
def test_rises_and_hidden_states_are_compared_where_something_is_predicted(
    model: PreTrainedModel, samples: Samples
) -> None:
    changed = copy.deepcopy(model)
    layer = changed.model.layers[0].mlp.down_proj
    layer.weight *= 0.5
    probe = LossProbe(model, samples, batch_size=5, device=CPU)
    for index, block in enumerate(model.model.layers):
        probe.follow(index, block)
        if index == 0:
            probe.branch("half", 0, block, block.mlp.down_proj, layer.weight)
        probe.advance(index, block)
    divergences, errors = [], []
    for index in range(12):
        given, mask = alone(samples, index), samples.inputs["attention_mask"][index]
        p, q = (m(**given).logits[0, CONDITION - 1 :].log_softmax(-1) for m in (model, changed))
        divergences.append((p.exp() * (p - q)).sum(-1))
        own, other = (m.model(**given).last_hidden_state[0][mask] for m in (model, changed))
        errors.append((other - own).square().sum(-1) / own.square().sum(-1))
    assert probe.rises()["half"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-5)
    found = hidden_state_errors(model, {"half": changed}, samples, batch_size=5)["half"]
    assert found[-1].item() == pytest.approx(torch.cat(errors).mean().item(), rel=1e-6)


def test_batches_do_not_matter_and_the_file_gives_the_samples_back(
    model: PreTrainedModel, samples: Samples, tmp_path: Path
) -> None:
    save_samples(samples, tmp_path / "samples.safetensors")
    again = load_samples(tmp_path / "samples.safetensors")
    assert fingerprint(again) == fingerprint(samples)
    changed = samples.inputs | {"caption_features": samples.inputs["caption_features"] + 1}
    assert fingerprint(Samples(samples.input_ids, changed)) != fingerprint(samples)
    assert fingerprint(samples.input_ids) != fingerprint(samples)
    for one, other in zip(capture(model, again, batch_size=1), capture(model, samples, batch_size=12), strict=True):
        for name, moments in one.moments.items():
            torch.testing.assert_close(moments.gram, other.moments[name].gram, rtol=1e-9, atol=1e-9)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    random_model(CONFIG).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["best", "paper"])
def test_the_command_line_prunes_it(samples: Samples, dense: Path, tmp_path: Path, recipe: str) -> None:
    save_samples(samples, tmp_path / "captions.safetensors")
    done = run(
        "prune", dense, "--ratio", 0.3, "--calibration", tmp_path / "captions.safetensors", "--samples", 12,
        "--batch-size", 5, "--recipe", recipe, "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    kept = load_samples(tmp_path / "out" / "calibration" / "input_ids.safetensors")
    assert fingerprint(kept) == fingerprint(samples)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.num_parameters() < AutoModelForCausalLM.from_pretrained(dense).num_parameters()
    given = {"caption_features": samples.inputs["caption_features"][:2].float()}
    given["attention_mask"] = samples.inputs["attention_mask"][:2, :CONDITION].long()
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "guidance_scale": 2.0, "pad_token_id": 0, **given}
    tokens = pruned.generate(samples.input_ids[:2, :CONDITION], **settings)
    assert tokens.shape == (2, CONDITION + TOKENS)
    done = run("perplexity", tmp_path / "out", "--data", tmp_path / "captions.safetensors", "--json")
    assert done.exit_code == 0, done.output
    assert '"windows": 12' in done.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_features": None}, "caption_features is missing"),
        (
            {"caption_features": torch.zeros(12, CONDITION, 19), "attention_mask": None},
            r"attention_mask is missing; caption_features must have the shape \(12, 5, 20\), got \(12, 5, 19\)",
        ),
        ({"caption_features": torch.full((12, CONDITION, 20), float("nan"))}, "caption_features holds NaN or infinite"),
        (
            {"attention_mask": torch.ones(12, CONDITION)},
            r"attention_mask must have the shape \(12, 21\), got \(12, 5\)",
        ),
        ({"attention_mask": torch.full((12, 21), 2)}, "attention_mask must be 0 at padding, which comes first"),
        ({"attention_mask": (torch.arange(21) < 20).expand(12, 21)}, "attention_mask must be 0 at padding"),
    ],
)
def test_bad_input_is_one_error(
    samples: Samples, dense: Path, tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    save_samples(samples, tmp_path / "captions.safetensors")
    tensors = load_file(tmp_path / "captions.safetensors") | changes
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, tmp_path / "bad.safetensors")
    done = run("prune", dense, "--ratio", 0.3, "--calibration", tmp_path / "bad.safetensors", "-o", tmp_path / "out")
    assert isinstance(done.exception, NumpruneError)
    assert str(done.exception).startswith(f"{tmp_path / 'bad.safetensors'}: the model is given caption_features and")
    assert re.search(message, str(done.exception))
    assert not (tmp_path / "out").exists()


def test_images_with_conditions_are_taken_whole(samples: Samples, dense: Path, tmp_path: Path) -> None:
    save_samples(samples, tmp_path / "captions.safetensors")
    done = run("perplexity", dense, "--data", tmp_path / "captions.safetensors", "--length", 10)
    assert "sequences of 21 tokens are taken whole" in str(done.exception)
