"""Images of a model that writes them as tokens: sampled from conditions, decoded to pixels.

What tokens look like is said by the model's folder. If it has a folder `decoder` with a VQ decoder, that decodes them;
else a token is a grey level, 0 black and the last one white.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import JanusVQVAE, PreTrainedConfig, PreTrainedModel

from numprune.errors import NumpruneError
from numprune.samples import Samples, checked_inputs

DECODER = "decoder"
CAPTIONS = "captions.safetensors"


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        guidance_scale: Of classifier-free guidance; 1: none.
        temperature: Of the logits.
        top_k: Only so many most likely tokens are drawn from; 0: from all.
        seed: Of the draw.
        batch_size: Images that are drawn together; which are drawn depends on it.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0
    batch_size: int = 100


def writes_images(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration writes images as tokens behind a condition."""
    return hasattr(config, "codebook_size")


def class_prompts(config: PreTrainedConfig, classes: Sequence[int]) -> Tensor:
    """(images, 1) token ids that condition on classes.

    Raises:
        NumpruneError: If the model is not conditioned on classes, or one is out of range.
    """
    if config.num_classes is None:
        raise NumpruneError("The model is conditioned on captions, not on classes: give caption features.")
    wrong = sorted({number for number in classes if not 0 <= number < config.num_classes})
    if wrong:
        raise NumpruneError(f"classes must be in [0, {config.num_classes}), got {', '.join(map(str, wrong))}")
    return config.codebook_size + torch.tensor(classes, dtype=torch.int64)[:, None]


def count_conditions(config: PreTrainedConfig, folder: Path) -> int:
    """How many classes, or captions in the model's folder, there are.

    Raises:
        NumpruneError: As `prompts_of_all`.
    """
    return config.num_classes or len(_read_captions(folder / CAPTIONS, config)["caption_features"])


def prompts_of_all(config: PreTrainedConfig, folder: Path, images: int) -> Samples:
    """Conditions for a number of images: all classes in turn, or all captions of the model's folder.

    Captions are in `captions.safetensors`: `caption_features` (captions, condition_tokens, caption_dim) and
    `attention_mask` (captions, condition_tokens), 0 where a caption is padded, on its left.

    Returns:
        (images, condition_tokens) token ids, and what else the model is given, image by image.

    Raises:
        NumpruneError: If captions are missing or do not fit the model.
    """
    if config.num_classes is not None:
        return Samples(class_prompts(config, [index % config.num_classes for index in range(images)]))
    captions = _read_captions(folder / CAPTIONS, config)
    chosen = torch.arange(images) % len(captions["caption_features"])
    prompts = torch.full((images, config.condition_tokens), config.codebook_size)
    return Samples(prompts, {name: tensor[chosen] for name, tensor in captions.items()})


@torch.no_grad()
def sample_images(model: PreTrainedModel, prompts: Samples, sampling: Sampling) -> Iterator[Tensor]:
    """Draws a whole image for each prompt; yields them batch by batch.

    With the same seed two models draw with the same random numbers, so that images of similar models are similar.

    Args:
        model: That writes images.
        prompts: Conditions of the images.
        sampling: How to draw.

    Yields:
        (batch, condition_tokens + tokens of an image) token ids.
    """
    model.eval()
    generate: Any = model.generate
    devices = [model.device] if model.device.type == "cuda" else []
    for number, batch in enumerate(prompts.split(sampling.batch_size)):
        given = batch.to(model.device)
        with torch.random.fork_rng(devices):
            torch.manual_seed(sampling.seed + number * sampling.batch_size)
            drawn: Tensor = generate(
                given.input_ids,
                do_sample=True,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=1.0,
                guidance_scale=sampling.guidance_scale if sampling.guidance_scale != 1 else None,
                max_new_tokens=model.config.grid_size**2,
                pad_token_id=0,
                **given.inputs,
            )
        yield drawn.cpu()


def images_drawn(sequences: Tensor, prompts: Samples) -> Samples:
    """Images that were drawn, as samples: their sequences, and what the model was given with their conditions."""
    inputs = dict(prompts.inputs)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = pad(inputs["attention_mask"], (0, sequences.shape[1] - prompts.length), value=True)
    return Samples(sequences, inputs)


def batches(prompts: Samples, sampling: Sampling) -> int:
    """How many batches `sample_images` yields."""
    return math.ceil(len(prompts) / sampling.batch_size)


@torch.no_grad()
def decode(sequences: Tensor, config: PreTrainedConfig, folder: Path, *, batch_size: int = 16) -> Tensor:
    """Pixels of sampled sequences.

    Args:
        sequences: (images, condition_tokens + tokens) token ids.
        config: Of the model that wrote them.
        folder: Of the dense model.
        batch_size: Images that are decoded together.

    Returns:
        (images, height, width, channels) uint8.
    """
    tokens = sequences[:, config.condition_tokens :]
    side = config.grid_size
    if not (folder / DECODER).is_dir():
        grey = tokens.float() * 255 / (config.codebook_size - 1)
        return grey.round().to(torch.uint8).view(-1, side, side, 1)
    decoder = JanusVQVAE.from_pretrained(folder / DECODER, use_safetensors=True).eval()
    entries, patches = decoder.config.num_embeddings, decoder.config.num_patches
    if (entries, patches) != (config.codebook_size, side):
        raise NumpruneError(
            f"{folder / DECODER} decodes {patches} x {patches} tokens of {entries}, but the model writes {side} x "
            f"{side} of {config.codebook_size}: convert it for this model."
        )
    pixels = torch.cat([decoder.decode(some) for some in tokens.split(batch_size)])
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def _read_captions(path: Path, config: PreTrainedConfig) -> dict[str, Tensor]:
    try:
        captions = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise NumpruneError(
            f"{path}: a model that is conditioned on captions needs this file with caption_features and "
            f"attention_mask ({error})."
        ) from None
    tokens = config.condition_tokens
    shapes: dict[str, tuple[int, ...]] = {
        "caption_features": (tokens, config.caption_dim),
        "attention_mask": (tokens,),
    }
    return checked_inputs(captions, shapes, len(captions.get("caption_features", ())), path)
