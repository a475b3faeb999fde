"""What images of digits are compared with: held-out digits as tokens, their statistics, and a classifier of digits."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from numprune.files import replace_on_success
from numprune.samples import save_samples
from tasks.images.digits import GREY_LEVELS, SIDE, load_digits, sequences, split
from tasks.images.features import extractor, train_classifier
from tasks.images.metrics import measure, read_reference, write_reference
from tasks.parameters import ReferenceImageTraining


def write_evaluation(folder: Path, training: ReferenceImageTraining) -> dict[str, Any]:
    """Writes `held_out.safetensors`, `classifier.safetensors` and `reference.npz`, split as for the training.

    Args:
        folder: Where to.
        training: Says which digits are held out.

    Returns:
        The classifier's accuracy on held-out digits, and the metrics of the digits trained on, by their names: what a
        model could at best be expected to reach.
    """
    pixels, classes = load_digits()
    chosen, held_out = split(classes, training.held_out, seed=training.seed)
    images = grey_images(pixels)
    save_samples(sequences(pixels, classes)[held_out], folder / "held_out.safetensors")
    classifier = train_classifier(images[chosen], classes[chosen], seed=training.seed)
    weights = folder / "classifier.safetensors"
    with replace_on_success(weights) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}, temporary)
    extract = extractor("digits", weights)
    with replace_on_success(folder / "reference.npz") as temporary:
        write_reference(temporary, images[held_out], extract)
    right = extract(images[held_out]).probabilities.argmax(1) == classes[held_out]
    reference = read_reference(folder / "reference.npz", extract)
    return {
        "classifier_accuracy": right.double().mean().item(),
        "digits_trained_on": measure(extract(images[chosen]), reference).as_dict(),
    }


def grey_images(pixels: Tensor) -> Tensor:
    """(images, 8, 8, 1) uint8 from (images, 64) grey levels."""
    grey = pixels.float() * 255 / (GREY_LEVELS - 1)
    return grey.round().to(torch.uint8).view(-1, SIDE, SIDE, 1)
