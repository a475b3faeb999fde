"""Metrics of images against their definitions, and reference files in ADM's form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg

from numprune.errors import NumpruneError
from tasks.images.drawing import grid, png
from tasks.images.features import Features, extractor
from tasks.images.metrics import (
    Statistics,
    coverage,
    frechet_distance,
    inception_score,
    measure,
    read_reference,
    write_reference,
)
from tasks.images.reference import write_held_out
from tasks.parameters import load_parameters

ROOT = Path(__file__).parents[3]
WEIGHTS = ROOT / "evaluation/digits/classifier.safetensors"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the digits that are not trained on."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_held_out(folder, WEIGHTS, load_parameters(ROOT / "params.yaml").reference_images.training)
    return folder / "reference.npz"


def random_features(images: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(images, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    return Features(pooled, pooled[:, :3].exp(), torch.randn(images, 4, generator=generator).softmax(-1))


def extract(images: torch.Tensor) -> Features:
    flat = images.flatten(1).double()
    return Features(flat[:, :6], flat[:, 6:9], flat[:, :4].softmax(-1))


def test_frechet_distance_is_that_of_the_matrix_root() -> None:
    a, b = (Statistics.of(random_features(50, seed).pooled) for seed in (0, 1))
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # Fewer images than features: the covariances are singular.
    few = Statistics.of(random_features(4, 2).pooled)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    shifted = Statistics(few.mean + 2, few.covariance)
    assert frechet_distance(few, shifted) == pytest.approx(4 * 6, abs=1e-6)


def test_inception_score_in_its_limits() -> None:
    sure = torch.eye(5, dtype=torch.float64).repeat(20, 1)
    assert inception_score(sure) == pytest.approx(5)
    assert inception_score(torch.full((40, 5), 0.2)) == pytest.approx(1)
    p = random_features(60, 0).probabilities.double()
    expected = np.exp(np.mean(np.sum(p.numpy() * np.log(p.numpy() / p.numpy().mean(0)), axis=1)))
    assert inception_score(p) == pytest.approx(expected)


def test_coverage_counts_balls_around_points() -> None:
    manifold, points = random_features(40, 0).pooled, random_features(30, 1).pooled
    within = 0
    for point in points:
        for index, centre in enumerate(manifold):
            others = sorted(torch.dist(centre, other).item() for j, other in enumerate(manifold) if j != index)
            if torch.dist(point, centre) <= others[2]:
                within += 1
                break
    assert 0 < within < 30
    assert coverage(manifold, points) == pytest.approx(within / 30)


def test_metrics_get_worse_as_images_move_away(held_out: Path) -> None:
    extract_digits = extractor("digits", WEIGHTS)
    reference = read_reference(held_out, extract_digits)
    with np.load(held_out) as file:
        images = torch.from_numpy(file["arr_0"])
    same = measure(extract_digits(images), reference)
    # The stored statistics are those of the stored images.
    assert same.fid == pytest.approx(0, abs=1e-4)
    assert (same.precision, same.recall) == (1, 1)
    assert same.inception_score > 8.5
    noisy = (images.float() + 60 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    worse = measure(extract_digits(noisy.to(torch.uint8)), reference)
    assert worse.fid > 1
    assert worse.sfid > 1
    assert worse.inception_score < same.inception_score
    assert worse.precision < 0.9


def test_a_reference_may_lack_images_or_statistics(tmp_path: Path) -> None:
    images = torch.randint(256, (30, 4, 4, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_reference(tmp_path / "whole.npz", images, extract)
    with np.load(tmp_path / "whole.npz") as file:
        content = dict(file)
    np.savez(tmp_path / "images.npz", arr_0=content.pop("arr_0"))
    np.savez(tmp_path / "statistics.npz", **content)
    other = extract(images.flip(1))
    whole, bare, statistics = (
        measure(other, read_reference(tmp_path / f"{name}.npz", extract)) for name in ("whole", "images", "statistics")
    )
    assert whole == bare
    assert (statistics.fid, statistics.sfid) == (whole.fid, whole.sfid)
    assert statistics.precision is None
    assert whole.precision is not None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "neither images"),
        ({"arr_0": np.zeros((2, 8, 8, 1))}, "must be uint8"),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "plain arrays"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, arrays, message: str) -> None:
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(NumpruneError, match=message):
        read_reference(tmp_path / "reference.npz", extract)
    with pytest.raises(NumpruneError, match="not found"):
        read_reference(tmp_path / "none.npz", extract)


def test_features_and_reference_must_be_of_one_classifier(held_out: Path, tmp_path: Path) -> None:
    reference = read_reference(held_out, extractor("digits", WEIGHTS))
    with pytest.raises(NumpruneError, match="64 pooled features, images"):
        measure(random_features(20, 0), reference)
    with pytest.raises(NumpruneError, match="takes images of 8 x 8 x 1"):
        extractor("digits", WEIGHTS)(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    with pytest.raises(NumpruneError, match="not found"):
        extractor("digits", tmp_path / "none.safetensors")


def test_a_grid_has_every_image_at_its_place() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(-1, 20, 20, 1)
    picture = grid(images, columns=3)
    assert picture.shape == (2 * 40 + 4, 3 * 40 + 2 * 4, 1)
    assert [picture[20, 20 + 44 * column, 0].item() for column in range(3)] == [0, 1, 2]
    assert [picture[64, 20 + 44 * column, 0].item() for column in range(3)] == [3, 4, 255]
    assert png(picture).startswith(b"\x89PNG")
