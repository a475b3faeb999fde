"""FID, sFID, inception score, precision and recall, as ADM's evaluation defines them.

Sources: FID, Heusel et al., arXiv 1706.08500; sFID, Nash et al., arXiv 2103.03841, the same on spatial features;
inception score, Salimans et al., arXiv 1606.03498; precision and recall, Kynkaanniemi et al., arXiv 1904.06991, with 3
neighbours. Reference statistics are a `.npz` file in ADM's form: images `arr_0`, and the means and covariances `mu`,
`sigma`, `mu_s`, `sigma_s` of their pooled and spatial features, which are computed where they are missing.
"""

import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from numprune.errors import NumpruneError
from tasks.images.features import Features

Array = NDArray[np.float64]
_NEIGHBOURS = 3
# The score is the mean over parts of so many images.
_SCORE_SPLIT = 5000
# Points whose distances are held at a time.
_DISTANCE_ROWS = 1000


@dataclass(frozen=True)
class ImageMetrics:
    """How close some images are to a reference.

    Attributes:
        fid: Frechet distance of pooled features; lower is better.
        sfid: The same of spatial features.
        inception_score: exp of the mutual information of image and class; higher is better.
        precision: Share of the images that lie among the reference's; None if the reference has no images.
        recall: Share of the reference's images that lie among these; None likewise.
    """

    fid: float
    sfid: float
    inception_score: float
    precision: float | None
    recall: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The metrics by their names."""
        return asdict(self)


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features."""

    mean: Array
    covariance: Array

    @classmethod
    def of(cls, features: Tensor) -> "Statistics":
        """Of (images, D) features."""
        values = features.double().numpy()
        return cls(values.mean(axis=0), np.cov(values, rowvar=False))


@dataclass(frozen=True)
class Reference:
    """What images are compared with.

    Attributes:
        pooled: Statistics of pooled features.
        spatial: Of spatial ones.
        features: (images, D) pooled features, for precision and recall; None if the file has no images.
    """

    pooled: Statistics
    spatial: Statistics
    features: Tensor | None


def read_reference(path: Path, extract: Callable[[Tensor], Features]) -> Reference:
    """Reads reference statistics.

    Raises:
        NumpruneError: If the file is missing, damaged, or holds neither images nor statistics.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in ("arr_0", "mu", "sigma", "mu_s", "sigma_s") if name in file}
    except FileNotFoundError:
        raise NumpruneError(f"images.reference: {path} not found.") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise NumpruneError(f"images.reference: {path} is no .npz file of plain arrays: {error}") from None
    images = content.get("arr_0")
    if images is not None and (images.ndim != 4 or images.dtype != np.uint8):
        raise NumpruneError(
            f"images.reference: arr_0 of {path} must be uint8 (images, height, width, channels), got {images.dtype} "
            f"{images.shape}"
        )
    if images is None and not {"mu", "sigma", "mu_s", "sigma_s"} <= content.keys():
        raise NumpruneError(
            f"images.reference: {path} holds neither images (arr_0) nor mu, sigma, mu_s and sigma_s: it must be in "
            "the form of ADM's reference batches."
        )
    found = None if images is None else extract(torch.from_numpy(images))
    pooled, spatial = (
        Statistics(content[mean], content[covariance])
        if mean in content and covariance in content
        else Statistics.of(getattr(found, name))
        for name, mean, covariance in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s"))
    )
    return Reference(pooled, spatial, None if found is None else found.pooled)


def write_reference(path: Path, images: Tensor, extract: Callable[[Tensor], Features]) -> None:
    """Writes images and their statistics in ADM's form.

    Args:
        path: Of the `.npz` file.
        images: (images, height, width, channels) uint8.
        extract: Gives their features.
    """
    found = extract(images)
    pooled, spatial = Statistics.of(found.pooled), Statistics.of(found.spatial)
    arrays: dict[str, Any] = {"mu": pooled.mean, "sigma": pooled.covariance}
    arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    with path.open("wb") as file:
        np.savez_compressed(file, arr_0=images.numpy(), **arrays)


def measure(found: Features, reference: Reference) -> ImageMetrics:
    """Compares images with a reference by their features.

    Raises:
        NumpruneError: If the reference's features are of another classifier.
    """
    for name, own, other in (
        ("pooled", found.pooled, reference.pooled),
        ("spatial", found.spatial, reference.spatial),
    ):
        if own.shape[1:] != other.mean.shape:
            raise NumpruneError(
                f"images.reference has {len(other.mean)} {name} features, images.features gives {own.shape[1]}: they "
                "must be of the same classifier."
            )
    real = reference.features
    return ImageMetrics(
        fid=frechet_distance(Statistics.of(found.pooled), reference.pooled),
        sfid=frechet_distance(Statistics.of(found.spatial), reference.spatial),
        inception_score=inception_score(found.probabilities),
        precision=None if real is None else coverage(real, found.pooled),
        recall=None if real is None else coverage(found.pooled, real),
    )


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared distance of two normal distributions."""
    # C_a C_b has the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2), which stay real where C is singular.
    values, vectors = linalg.eigh(a.covariance)
    half = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    root_trace = np.sqrt(linalg.eigvalsh(half @ b.covariance @ half).clip(min=0)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_trace)


def inception_score(probabilities: Tensor) -> float:
    """The exponential of the mean divergence of each image's class probabilities from their mean, in parts of 5000."""
    scores = []
    for part in probabilities.double().split(_SCORE_SPLIT):
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0, keepdim=True))
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores))


def coverage(manifold: Tensor, points: Tensor) -> float:
    """Share of points that lie within reach of the manifold's.

    A point of the manifold reaches as far as its third neighbour in it. The share of generated images within reach of
    real ones is the precision, that of real ones within reach of generated ones the recall.
    """
    known, asked = manifold.double().numpy(), points.double().numpy()
    neighbours = NearestNeighbors(n_neighbors=_NEIGHBOURS + 1).fit(known)
    reach = neighbours.kneighbors(known)[0][:, -1]
    within = [
        (torch.cdist(some, torch.from_numpy(known)) <= torch.from_numpy(reach)).any(dim=1)
        for some in torch.from_numpy(asked).split(_DISTANCE_ROWS)
    ]
    return float(torch.cat(within).double().mean())
