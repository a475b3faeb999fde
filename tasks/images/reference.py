"""What images of digits are compared with: held-out digits as tokens, their statistics, and a classifier of digits."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from numprune.files import replace_on_success
from numprune.samples import save_samples
from tasks.images.digits import GREY_LEVELS, SIDE, load_digits, sequences, split
from tasks.images.features import extractor, train_classifier
from tasks.images.metrics import measure, read_reference, write_reference
from tasks.parameters import ReferenceImageTraining


def write_held_out(folder: Path, classifier: Path, training: ReferenceImageTraining) -> None:
    """Writes the digits that are not trained on: `held_out.safetensors`, tokens, and `reference.npz`, ADM's form.

    Args:
        folder: Where to; it appears only when complete.
        classifier: Weights of the classifier whose features are compared.
        training: Says which digits are held out.

    Raises:
        NumpruneError: If there are no such weights.
    """
    extract = extractor("digits", classifier)
    pixels, classes = load_digits()
    _, held_out = split(classes, training.held_out, seed=training.seed)
    with replace_on_success(folder) as temporary:
        temporary.mkdir()
        save_samples(sequences(pixels, classes)[held_out], temporary / "held_out.safetensors")
        write_reference(temporary / "reference.npz", grey_images(pixels)[held_out], extract)


def train_digits_classifier(weights: Path, training: ReferenceImageTraining) -> float:
    """Trains the classifier on the digits that the model is trained on, and saves it.

    Returns:
        Its accuracy on held-out digits.
    """
    pixels, classes = load_digits()
    chosen, held_out = split(classes, training.held_out, seed=training.seed)
    images = grey_images(pixels)
    classifier = train_classifier(images[chosen], classes[chosen], seed=training.seed)
    with replace_on_success(weights) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}, temporary)
    right = extractor("digits", weights)(images[held_out]).probabilities.argmax(1) == classes[held_out]
    return right.double().mean().item()


def measure_trained_on(reference: Path, classifier: Path, training: ReferenceImageTraining) -> dict[str, float | None]:
    """Metrics of the digits trained on, by name: what a model could at best be expected to reach."""
    pixels, classes = load_digits()
    chosen, _ = split(classes, training.held_out, seed=training.seed)
    extract = extractor("digits", classifier)
    return measure(extract(grey_images(pixels)[chosen]), read_reference(reference, extract)).as_dict()


def grey_images(pixels: Tensor) -> Tensor:
    """(images, 8, 8, 1) uint8 from (images, 64) grey levels."""
    grey = pixels.float() * 255 / (GREY_LEVELS - 1)
    return grey.round().to(torch.uint8).view(-1, SIDE, SIDE, 1)
