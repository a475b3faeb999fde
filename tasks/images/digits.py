"""Handwritten digits that come with scikit-learn: 1797 images of 8 x 8 pixels in 17 grey levels.

Every pixel is a token, so an image of the model needs no decoder. Source: E. Alpaydin and C. Kaynak, Optical
Recognition of Handwritten Digits, UCI Machine Learning Repository (CC BY 4.0); scikit-learn has its test part.
"""

import torch
from torch import Tensor

GREY_LEVELS = 17
SIDE = 8
CLASSES = 10


def load_digits() -> tuple[Tensor, Tensor]:
    """All pixels, (1797, 64) int64 from the top left to the bottom right, and classes, (1797,) int64."""
    from sklearn import datasets

    found = datasets.load_digits()
    return torch.from_numpy(found.data).long(), torch.from_numpy(found.target).long()


def split(classes: Tensor, held_out: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and held-out ones; the classes have the same share in both."""
    from sklearn.model_selection import train_test_split

    indices = torch.arange(len(classes))
    train, rest = train_test_split(indices, test_size=held_out, random_state=seed, stratify=classes)
    return train, rest


def sequences(pixels: Tensor, classes: Tensor) -> Tensor:
    """(images, 65) token ids as LlamaGen reads them: the class, then the pixels."""
    return torch.cat([GREY_LEVELS + classes[:, None], pixels], dim=1)
