"""Prompts, sampled images and their pixels."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import JanusVQVAE, JanusVQVAEConfig

from numprune.errors import NumpruneError
from numprune.images import (
    Sampling,
    batches,
    class_prompts,
    count_conditions,
    decode,
    prompts_of_all,
    sample_images,
    writes_images,
)
from numprune.llamagen import LlamaGenConfig
from numprune.samples import Samples
from tests.numprune.conftest import CONFIGS, random_model
from tests.numprune.test_llamagen import SMALL

CLASSES = LlamaGenConfig(**SMALL, num_classes=10)
CAPTIONS = LlamaGenConfig(**SMALL, num_classes=None, caption_dim=20, condition_tokens=5)


def drawn(config: LlamaGenConfig, sampling: Sampling, images: int, folder: Path = Path(), seed: int = 0) -> Tensor:
    prompts = prompts_of_all(config, folder, images)
    parts = list(sample_images(random_model(config, seed), prompts, sampling))
    assert len(parts) == batches(prompts, sampling)
    return torch.cat(parts)


def test_which_models_write_images() -> None:
    assert [name for name, config in CONFIGS.items() if writes_images(config)] == ["llamagen"]


def test_images_of_all_classes_in_turn() -> None:
    sequences = drawn(CLASSES, Sampling(batch_size=8), 23)
    assert sequences.shape == (23, 17)
    assert torch.equal(sequences[:, 0], CLASSES.codebook_size + torch.arange(23) % 10)
    assert sequences[:, 1:].max() < CLASSES.codebook_size


def test_the_seed_decides_and_the_callers_random_numbers_stay() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (drawn(CLASSES, Sampling(seed=seed), 4) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(5)
    model, prompts = random_model(CLASSES), Samples(class_prompts(CLASSES, [1]))
    torch.manual_seed(5)
    list(sample_images(model, prompts, Sampling()))
    assert torch.equal(torch.rand(1), expected)


@torch.no_grad()
def test_tokens_are_drawn_from_the_models_probabilities() -> None:
    """The first token of many images of one class, with temperature, by its frequency."""
    model = random_model(CLASSES)
    prompts = Samples(class_prompts(CLASSES, [3] * 4000))
    sampling = Sampling(temperature=2.0, batch_size=4000)
    tokens = torch.cat(list(sample_images(model, prompts, sampling)))[:, 1]
    expected = (model(prompts.input_ids[:1]).logits[0, -1] / 2).softmax(-1)
    found = torch.bincount(tokens, minlength=CLASSES.codebook_size) / 4000
    assert (found - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5
    few = torch.cat(list(sample_images(model, prompts[:500], replace(sampling, top_k=2))))[:, 1]
    assert set(few.tolist()) <= set(expected.topk(2).indices.tolist())


@pytest.mark.parametrize("classes", [[10], [-1, 3]])
def test_classes_out_of_range(classes: list[int]) -> None:
    with pytest.raises(NumpruneError, match=r"classes must be in \[0, 10\), got"):
        class_prompts(CLASSES, classes)
    with pytest.raises(NumpruneError, match="conditioned on captions"):
        class_prompts(CAPTIONS, [0])


def test_captions_come_from_the_models_folder(tmp_path: Path) -> None:
    with pytest.raises(NumpruneError, match="needs this file with caption_features"):
        count_conditions(CAPTIONS, tmp_path)
    features = torch.randn(2, 5, 20)
    captions = {"caption_features": features, "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])}
    save_file(captions, tmp_path / "captions.safetensors")
    assert count_conditions(CAPTIONS, tmp_path) == 2
    prompts = prompts_of_all(CAPTIONS, tmp_path, 3)
    assert torch.equal(prompts.inputs["caption_features"], features[[0, 1, 0]])
    sequences = drawn(CAPTIONS, Sampling(guidance_scale=2.0, batch_size=2), 3, tmp_path)
    assert sequences.shape == (3, 5 + 16)
    assert torch.equal(sequences[:, :5], prompts.input_ids)
    save_file(captions | {"caption_features": torch.randn(2, 5, 19)}, tmp_path / "captions.safetensors")
    with pytest.raises(NumpruneError, match=r"caption_features must have the shape \(2, 5, 20\), got \(2, 5, 19\)"):
        prompts_of_all(CAPTIONS, tmp_path, 3)


def test_without_a_decoder_tokens_are_grey_levels(tmp_path: Path) -> None:
    sequences = torch.tensor([[22, *range(16)], [23, *range(3, 19)]])
    pixels = decode(sequences, CLASSES, tmp_path)
    assert pixels.shape == (2, 4, 4, 1)
    assert pixels[0, 0, :3, 0].tolist() == [0, 14, 28]
    assert pixels[1, 3, 3, 0] == 255


@torch.no_grad()
def test_a_decoder_in_the_models_folder_decodes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 8}
    vq = JanusVQVAE(JanusVQVAEConfig(num_embeddings=19, embed_dim=4, num_patches=4, **sizes)).eval()
    vq.save_pretrained(tmp_path / "decoder")
    sequences = torch.randint(19, (3, 17))
    expected = vq.decode(sequences[:, 1:]).clamp(-1, 1).add(1).mul(127.5).round()
    found = decode(sequences, CLASSES, tmp_path, batch_size=2)
    assert torch.equal(found, expected.to(torch.uint8).permute(0, 2, 3, 1))
    with pytest.raises(NumpruneError, match="decodes 4 x 4 tokens of 19, but the model writes 4 x 4 of 20"):
        decode(sequences, LlamaGenConfig(**SMALL | {"codebook_size": 20}), tmp_path)
