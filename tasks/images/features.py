"""What images are compared by: features of a classifier, pooled and spatial, and its class probabilities.

Two classifiers are known. `digits` is a small network trained on the same digits as the reference image model; figures
made with it compare only with each other. `inception` is the Inception network that all published figures are made
with; it comes from torch-fidelity, and its weights from a file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d, relu

from numprune.errors import NumpruneError
from tasks.images.digits import CLASSES

Extractor = Literal["digits", "inception"]
_BATCH = 250
# Channels of the spatial features: so many of the first ones, as in ADM's evaluation.
_SPATIAL_CHANNELS = {"digits": 4, "inception": 7}


@dataclass(frozen=True)
class Features:
    """Features of some images.

    Attributes:
        pooled: (images, D) of the layer before the classes.
        spatial: (images, S) of a layer that still knows where things are.
        probabilities: (images, classes).
    """

    pooled: Tensor
    spatial: Tensor
    probabilities: Tensor


class DigitsClassifier(nn.Module):
    """A convolutional network for 8 x 8 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features, spatial features and logits of (images, 1, 8, 8) in [0, 1]."""
        hidden = max_pool2d(relu(self.conv2(relu(self.conv1(images)))), 2)
        hidden = relu(self.conv3(hidden))
        pooled = hidden.mean((2, 3))
        return pooled, hidden[:, : _SPATIAL_CHANNELS["digits"]].flatten(1), self.head(pooled)


def train_classifier(images: Tensor, classes: Tensor, *, seed: int, epochs: int = 30) -> DigitsClassifier:
    """Trains a classifier of digits.

    Args:
        images: (images, 8, 8, 1) uint8.
        classes: (images,) of them.
        seed: Of weights and order.
        epochs: Passes through the images.
    """
    torch.manual_seed(seed)
    classifier = DigitsClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            cross_entropy(classifier(_scaled(images[batch]))[2], classes[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return classifier.eval()


def extractor(kind: Extractor, weights: Path) -> Callable[[Tensor], Features]:
    """A function from (images, height, width, channels) uint8 to their features.

    Raises:
        NumpruneError: If the weights are missing or of another network, or torch-fidelity is not installed.
    """
    if not weights.is_file():
        raise NumpruneError(f"images.features.weights: {weights} not found.")
    one_batch = _digits(weights) if kind == "digits" else _inception(weights)

    @torch.no_grad()
    def extract(images: Tensor) -> Features:
        parts = [one_batch(some) for some in images.split(_BATCH)]
        pooled, spatial, logits = (torch.cat([part[index] for part in parts]) for index in range(3))
        return Features(pooled, spatial, logits.double().softmax(-1))

    return extract


def _digits(weights: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    classifier = DigitsClassifier()
    try:
        classifier.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise NumpruneError(f"images.features.weights: {weights} is no classifier of digits: {error}") from None

    def features(images: Tensor) -> tuple[Tensor, ...]:
        if images.shape[1:] != (8, 8, 1):
            raise NumpruneError(
                f"The classifier of digits takes images of 8 x 8 x 1, got {tuple(images.shape[1:])}: set "
                "images.features to inception."
            )
        found: tuple[Tensor, ...] = classifier(_scaled(images))
        return found

    return features


def _inception(weights: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise NumpruneError(
            f"images.features.kind inception needs torch-fidelity and torchvision: install `numprune[inception]` "
            f"({error})."
        ) from None
    network: Any = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    seen: dict[str, Tensor] = {}
    # TensorFlow's name of this layer is mixed_6/conv.
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _inputs, output: seen.update(spatial=output))

    def features(images: Tensor) -> tuple[Tensor, ...]:
        rgb = images.expand(-1, -1, -1, 3) if images.shape[3] == 1 else images
        pooled, logits = network(rgb.permute(0, 3, 1, 2).contiguous())
        return pooled, seen["spatial"][:, : _SPATIAL_CHANNELS["inception"]].flatten(1), logits

    return features


def _scaled(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 255
