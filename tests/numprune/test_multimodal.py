"""Tiny random Janus and Emu3 models, pruned by the command line inside the whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    PreTrainedModel,
)
from typer.testing import CliRunner

from numprune.architectures import all_groups
from numprune.checkpoint import load_config, load_model
from numprune.cli import app
from numprune.errors import NumpruneError
from numprune.multimodal import language_config, language_model
from numprune.plan import PruningPlan
from numprune.slicing import slice_block

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 32,
    "mlp_ratio": 2.0,
}
VQ = {
    "embed_dim": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 8,
}
JANUS_VQ = VQ | {"num_embeddings": 32, "num_patches": 4, "projection_dim": 32, "image_token_embed_dim": 32}
# Of Emu3 image tokens are tokens of the vocabulary like others: these are the ids 10 to 29.
VOCABULARY = {"<image>": 3} | {f"<|visual token {number:06d}|>": 10 + number for number in range(20)}
EMU3_VQ = VQ | {"codebook_size": 20, "latent_channels": 4, "hidden_size": 32, "attn_resolutions": [1]}
CONFIGS = {
    "janus": JanusConfig(text_config=TEXT | {"model_type": "llama"}, vision_config=VISION, vq_config=JANUS_VQ),
    "emu3": Emu3Config(text_config=TEXT | {"num_key_value_heads": 2}, vq_config=EMU3_VQ, vocabulary_map=VOCABULARY),
}
CLASSES = {"janus": JanusForConditionalGeneration, "emu3": Emu3ForConditionalGeneration}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A dense model on disk."""
    torch.manual_seed(0)
    model = CLASSES[request.param](CONFIGS[request.param]).eval()
    with torch.no_grad():
        for parameter in model.model.get_decoder().parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / request.param)
    (tmp_path / request.param / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    return tmp_path / request.param


@pytest.fixture
def input_ids(tmp_path: Path) -> Tensor:
    """Token ids, image tokens among them, which the file `ids.safetensors` holds as well."""
    ids = torch.randint(4, 64, (16, 24), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    return ids


def prune(folder: Path, output: Path, *options: str) -> None:
    arguments = ["prune", folder, "--ratio", 0.4, "--calibration", folder.parent / "ids.safetensors"]
    arguments += ["--samples", 16, "--length", 24, "--output", output, *options]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.exception


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@torch.no_grad()
def test_the_language_model_is_that_of_the_whole(folder: Path, input_ids: Tensor) -> None:
    whole = load(folder)
    inside = language_model(whole)
    torch.testing.assert_close(inside(input_ids).logits, whole(input_ids=input_ids).logits)
    sizes = whole.num_parameters(), inside.num_parameters()
    slice_block(inside.model.layers[0], [all_groups(inside)[1]], {"0.mlp": torch.arange(7)})
    assert whole.num_parameters() == sizes[0] - 33 * 3 * 32
    assert sizes[0] > sizes[1]


@torch.no_grad()
@pytest.mark.parametrize("shapes", [[], ["--uniform", "--heads", "2"]])
def test_the_command_line_prunes_it_in_place(
    folder: Path, input_ids: Tensor, tmp_path: Path, shapes: list[str]
) -> None:
    """Ragged, or of a stock class: what comes back is the whole with a smaller language model."""
    prune(folder, tmp_path / "out", *shapes)
    dense, pruned = load(folder), load(tmp_path / "out")
    assert type(pruned).__name__ == ("" if shapes else "Ragged") + type(dense).__name__
    plan = PruningPlan.load(tmp_path / "out" / "pruning_plan.json")
    assert pruned.num_parameters() == dense.num_parameters() - plan.dense_parameters + plan.kept_parameters
    assert plan.achieved_ratio > 0.3
    inside = pruned.model.get_decoder()
    other = {name: t for name, t in dense.model.state_dict().items() if not name.startswith(("language", "text_"))}
    kept = pruned.model.state_dict()
    assert other
    assert all(torch.equal(kept[name], tensor) for name, tensor in other.items())
    # The same hidden states as by the steps without the whole: recovery has brought them nearer than the cut alone.
    found = load_model(tmp_path / "out")(input_ids).logits
    torch.testing.assert_close(pruned(input_ids=input_ids).logits, found)
    expected = dense(input_ids=input_ids).logits
    assert (found - expected).norm() < 0.7 * expected.norm()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = pruned.generate(input_ids=input_ids[:2], **settings)
    assert torch.equal(cached, pruned.generate(input_ids=input_ids[:2], use_cache=False, **settings))
    assert cached.shape == (2, 32)
    if folder.name == "janus":  # Image tokens are predicted by its other head, from the same hidden states.
        hidden = inside(input_ids=input_ids).last_hidden_state
        assert pruned.model.generation_head(hidden).shape == (16, 24, 32)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert "AutoModelForImageTextToText" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_it_loads_where_numprune_is_not_installed_and_can_be_pruned_again(
    folder: Path, input_ids: Tensor, tmp_path: Path
) -> None:
    prune(folder, tmp_path / "out", "--recovery", "none")
    prune(tmp_path / "out", tmp_path / "again", "--recovery", "none")
    assert load(tmp_path / "again").num_parameters() < load(tmp_path / "out").num_parameters()
    program = (
        "import sys, torch; from safetensors.torch import load_file\n"
        "from transformers import AutoModelForImageTextToText\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "ids = load_file(sys.argv[2])['input_ids']\n"
        "print(model(input_ids=ids).logits.double().sum().item())\n"
        "assert 'numprune' not in sys.modules"
    )
    command = [sys.executable, "-c", program, tmp_path / "again", tmp_path / "ids.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load(tmp_path / "again")(input_ids=input_ids).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-4)


def test_another_language_model_inside_is_refused(tmp_path: Path) -> None:
    text = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}
    JanusConfig(text_config=text, vision_config=VISION, vq_config=JANUS_VQ).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "janus"
    with pytest.raises(NumpruneError, match="language model of this janus is gpt2; only LLaMA is supported"):
        language_config(load_config(tmp_path))
