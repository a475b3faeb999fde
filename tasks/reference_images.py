"""Train the small image model that ships with the repository: a LlamaGen that writes digits, conditioned on the class.

Dropout stands against learning 1297 digits by heart; it is part of the training alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from numprune.checkpoint import load_model
from numprune.files import replace_on_success
from numprune.llamagen import LlamaGenConfig, LlamaGenForCausalLM
from numprune.llamagen_conversion import save_llamagen
from numprune.perplexity import perplexity, window_losses
from tasks.images.digits import CLASSES, GREY_LEVELS, SIDE, load_digits, sequences, split
from tasks.images.evaluation import measure_images
from tasks.parameters import Images, Parameters, ReferenceImages, ReferenceImageShape
from tasks.training import train

_MICRO_BATCH = 64


def train_reference_images(output: Path, settings: ReferenceImages) -> dict[str, Any]:
    """Trains the model and saves it in bfloat16.

    Args:
        output: Folder of the finished model; `output.parent` also holds the checkpoint of an unfinished training.
        settings: Shape and training.

    Returns:
        What a model card states: images trained on, last loss, perplexity on held-out digits and on as many others.
    """
    training = settings.training
    pixels, classes = load_digits()
    chosen, held_out = split(classes, training.held_out, seed=training.seed)
    rows = sequences(pixels, classes)
    torch.manual_seed(training.seed)
    model = LlamaGenForCausalLM(_configuration(settings.shape))
    no_class = model.config.vocab_size - 1

    def loss_of(batch: Tensor) -> Tensor:
        dropped = torch.rand(len(batch), device=batch.device) < training.condition_dropout
        batch = batch.clone()
        batch[dropped, 0] = no_class
        logits = model(batch, use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())

    checkpoint = output.with_name(f"{output.name}.checkpoint.pt")
    with _dropout(model, training.dropout):
        loss = train(
            model,
            rows[chosen],
            loss_of,
            training,
            checkpoint=checkpoint,
            settings=settings.model_dump(),
            micro_batch=_MICRO_BATCH,
        )
    save_llamagen(model.bfloat16(), output)
    checkpoint.unlink(missing_ok=True)
    trained = load_model(output, dtype=torch.float32)
    quality = {
        name: perplexity(torch.cat(list(window_losses(trained, some, batch_size=100))), some.shape[1]).perplexity
        for name, some in (("perplexity", rows[held_out]), ("train_perplexity", rows[chosen[: len(held_out)]]))
    }
    return {"images": len(chosen), "train_loss": loss, "parameters": model.num_parameters(), **quality}


def _configuration(shape: ReferenceImageShape) -> LlamaGenConfig:
    return LlamaGenConfig(
        codebook_size=GREY_LEVELS,
        grid_size=SIDE,
        num_classes=CLASSES,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
    )


@contextmanager
def _dropout(model: LlamaGenForCausalLM, share: float) -> Iterator[None]:
    """Puts dropout behind the embedding and every output projection."""

    def drop(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return dropout(output, share)

    blocks: Any = model.model.layers
    outputs = [layer for block in blocks for layer in (block.self_attn.o_proj, block.mlp.down_proj)]
    hooks = [layer.register_forward_hook(drop) for layer in (model.model.embed_tokens, *outputs)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure(folder: Path, images: Images) -> dict[str, Any]:
    """Metrics of the images that the model writes."""
    return measure_images(load_model(folder, dtype=torch.float32), folder, images, "images")


def write_card(
    folder: Path, parameters: Parameters, training: dict[str, Any], metrics: dict[str, Any], data: dict[str, Any]
) -> None:
    """Writes `README.md` into the model's folder."""
    shape, settings = parameters.reference_images.shape, parameters.reference_images.training
    floor = data["digits_trained_on"]
    names = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception score"}
    names |= {"precision": "Precision", "recall": "Recall"}
    lines = "\n".join(f"| {title} | {metrics[key]:.2f} | {floor[key]:.2f} |" for key, title in names.items())
    card = f"""---
license: apache-2.0
library_name: numprune
pipeline_tag: unconditional-image-generation
---
# {folder.name}

A small LlamaGen, conditioned on the class, that numprune is tried on. It writes handwritten digits of 8 x 8 pixels, one
token a pixel, and is of no use for anything else.

| | |
|---|---|
| parameters | {training["parameters"]:,} |
| shape | {shape.layers} blocks, hidden {shape.hidden}, MLP {shape.intermediate}, {shape.heads} heads |
| tokens | {GREY_LEVELS} grey levels; {CLASSES} classes and no class as conditions |
| training images | {training["images"]:,} of the {training["images"] + settings.held_out:,} digits of scikit-learn, \
class by class in proportion, seed {settings.seed} |
| training | {settings.steps:,} steps of {settings.batch} images, dropout {settings.dropout}, without class \
{settings.condition_dropout:.0%} |
| perplexity on the {settings.held_out} held-out digits | {training["perplexity"]:.3f} |
| perplexity on as many it was trained on | {training["train_perplexity"]:.3f} |

{metrics["protocol"]["samples"]:,} images of it, and the digits that it was trained on, compared with the held-out ones:

| | model | digits trained on |
|---|---:|---:|
{lines}

FID and the others are measured with features of a classifier of digits, not of Inception: they compare with nothing
outside of this repository. The classifier is right about {data["classifier_accuracy"]:.1%} of the held-out digits.
Guidance {metrics["protocol"]["guidance_scale"]}, temperature {metrics["protocol"]["temperature"]}.

The digits are those of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, CC BY 4.0.

    import numprune
    model = AutoModelForCausalLM.from_pretrained("{folder}")

Train it again: `make train-images`.
"""
    with replace_on_success(folder / "README.md") as path:
        path.write_text(card, encoding="utf-8")
