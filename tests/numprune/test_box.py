import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numprune import box
from numprune.box import box_score
from numprune.errors import NumpruneError
from numprune.newton import numerical_score


def inputs(seed: int, tokens: int, channels: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Unlike channels that correlate, so that the best mask lies on some of its bounds; A has mean diagonal 1."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(tokens, channels)) + generator.normal(size=(tokens, 1))
    x *= np.exp(generator.normal(size=channels))
    w = generator.normal(size=(channels, outputs)) + 1
    return x / np.sqrt(np.diag(curvature(x, w)).mean()), w


def curvature(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return (w @ w.T) * (x.T @ x)


def score(x: np.ndarray, w: np.ndarray, ratio: float, penalty: float = math.inf) -> np.ndarray:
    return box_score(torch.tensor(x.T @ x), torch.tensor(w.T), ratio, penalty=penalty).numpy()


def cost(a: np.ndarray, z: np.ndarray, ratio: float, penalty: float) -> float:
    miss = z.sum() - (1 - ratio) * len(z)
    return (1 - z) @ a @ (1 - z) / 2 + (0 if penalty == math.inf else penalty * miss**2 / 2)


def enumerated(a: np.ndarray, ratio: float, penalty: float) -> np.ndarray:
    """The best of all masks that are stationary with some entries at 0, some at 1 and the rest free."""
    channels = len(a)
    budget = ratio * channels
    best, lowest = np.empty(0), math.inf
    for bounds in itertools.product([0.0, 1.0, None], repeat=channels):
        free = [i for i, bound in enumerate(bounds) if bound is None]
        if not free and penalty == math.inf:
            continue
        removed = np.array([bound or 0.0 for bound in bounds])
        # A_ff w_f - y = -A_fc w_c and <1, w_f> + y / penalty = budget - <1, w_c>.
        border = np.ones((len(free), 1))
        system = np.block([[a[np.ix_(free, free)], -border], [border.T, np.full((1, 1), 1 / penalty)]])
        solved = np.linalg.solve(system, np.append(-(a @ removed)[free], budget - removed.sum()))
        removed[free] = solved[:-1]
        candidate = cost(a, 1 - removed, ratio, penalty)
        if candidate < lowest and removed.min() >= -1e-12 and removed.max() <= 1 + 1e-12:
            best, lowest = 1 - removed, candidate
    return best


def relative_gap(a: np.ndarray, z: np.ndarray, ratio: float, penalty: float) -> float:
    """How far a mask's cost can be above the lowest, as a share of it; 0 only where the KKT conditions hold."""
    gradient = a @ (z - 1)
    if penalty == math.inf:
        gradient -= gradient[(z > 1e-3) & (z < 1 - 1e-3)].mean()
    else:
        gradient += penalty * (z.sum() - (1 - ratio) * len(z))
    # Convex: no mask is cheaper than the tangent at z, and the tangent's minimum over the box is at a corner.
    gap = np.maximum(gradient, 0) @ z + np.maximum(-gradient, 0) @ (1 - z)
    return gap / cost(a, z, ratio, penalty)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.integers(1, 5),
    outputs=st.integers(1, 4),
    ratio=st.floats(0.02, 0.98),
    penalty=st.sampled_from([0.01, 1.0, 100.0, math.inf]),
)
def test_score_is_the_best_of_all_active_sets(seed, channels, outputs, ratio, penalty):
    x, w = inputs(seed, 40, channels, outputs)
    a = curvature(x, w)
    z, expected = score(x, w, ratio, penalty), enumerated(a, ratio, penalty)
    np.testing.assert_allclose(cost(a, z, ratio, penalty), cost(a, expected, ratio, penalty), rtol=1e-8, atol=1e-14)
    # Looser: near the optimum the cost hardly depends on the mask.
    np.testing.assert_allclose(z, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("seed", "tokens", "channels", "outputs", "ratio"),
    [(1, 40, 2, 1, 0.25), (179395245, 40, 2, 3, 0.7161717108740454), (1195091395, 200, 3, 4, 0.648865355015814)],
)
def test_steps_do_not_cycle(seed, tokens, channels, outputs, ratio):
    """Found by chance: the longest steps inside the box run in circles here."""
    x, w = inputs(seed, tokens, channels, outputs)
    assert relative_gap(curvature(x, w), score(x, w, ratio, 0.01), ratio, 0.01) < 1e-6


@pytest.mark.parametrize("penalty", [1e-6, 0.01, 1.0, 100.0, math.inf])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6, 0.95])
def test_optimality_conditions(ratio, penalty):
    x, w = inputs(0, 200, 60, 8)
    z = score(x, w, ratio, penalty=penalty)
    assert z.min() >= 0
    assert z.max() <= 1
    assert relative_gap(curvature(x, w), z, ratio, penalty) < 1e-6
    if penalty == math.inf:
        np.testing.assert_allclose(z.sum(), (1 - ratio) * 60, rtol=1e-9)


def test_the_box_matters_and_bounds_are_reached():
    x, w = inputs(0, 200, 60, 8)
    newton = numerical_score(torch.tensor(x.T @ x), torch.tensor(w.T), 0.5)
    assert newton.min() < -0.1
    assert newton.max() > 1.1
    z = score(x, w, 0.5)
    assert z.min() < 1e-8
    assert z.max() > 1 - 1e-8


@pytest.mark.parametrize("penalty", [0.1, 10.0, math.inf])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_inside_the_box_it_is_the_newton_score(penalty, damping):
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(500, 20)), generator.normal(size=(20, 30))
    gram, weight = torch.tensor(x.T @ x), torch.tensor(w.T)
    newton = numerical_score(gram, weight, 0.3, penalty, damping)
    assert 0 < newton.min() < newton.max() < 1
    boxed = box_score(gram, weight, 0.3, penalty=penalty, damping=damping)
    torch.testing.assert_close(boxed, newton, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 5, 15])
@pytest.mark.parametrize("penalty", [1.0, math.inf])
def test_singular_curvature(tokens, penalty, caplog):
    x, w = inputs(tokens, tokens, 16, 1)
    a = curvature(x, w)
    assert np.linalg.matrix_rank(a) < 16
    z = box_score(torch.tensor(x.T @ x), torch.tensor(w.T), 0.4, penalty=penalty, subject="the test's matrix").numpy()
    assert "the test's matrix is near-singular: damped by 1e-08" in caplog.text
    assert relative_gap(a + 1e-8 * np.eye(16), z, 0.4, penalty) < 1e-6


def test_dead_channels_go_first():
    x, w = inputs(0, 100, 10, 6)
    x[:, 3] = 0
    w[7] = 0
    np.testing.assert_allclose(score(x, w, 0.2)[[3, 7]], 0, atol=1e-5)
    # Where the budget is smaller than that, they share it.
    np.testing.assert_allclose(score(x, w, 0.1)[[3, 7]], 0.5, atol=1e-3)


def test_where_nothing_was_measured_all_channels_are_alike():
    torch.testing.assert_close(
        box_score(torch.zeros(6, 6), torch.ones(2, 6), 0.25), torch.full((6,), 0.75, dtype=torch.float64)
    )


def test_scale_of_the_statistics_does_not_matter():
    x, w = inputs(0, 200, 30, 8)
    np.testing.assert_allclose(score(x, w, 0.4), score(1e4 * x, w, 0.4), atol=1e-9)
    np.testing.assert_allclose(
        score(x, w, 0.4, penalty=2.0), score(1e4 * x, w, 0.4, penalty=2.0e8), rtol=1e-7, atol=1e-9
    )


def test_single_precision_statistics_and_outlier_channels():
    x, w = inputs(0, 500, 60, 30)
    x[:, :2] *= 1e3
    gram, weight = torch.tensor(x.T @ x).float(), torch.tensor(w.T).bfloat16()
    z = box_score(gram, weight, 0.3).numpy()
    weight = weight.double()
    a = (weight.T @ weight * gram.double()).numpy()
    assert relative_gap(a, z, 0.3, math.inf) < 1e-6


def test_what_does_not_converge_is_an_error(monkeypatch):
    monkeypatch.setattr(box, "_MOST_ITERATIONS", 2)
    x, w = inputs(0, 100, 10, 6)
    with pytest.raises(NumpruneError, match="the mask of A did not converge in 2 iterations"):
        score(x, w, 0.5)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, math.nan])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\)"):
        box_score(torch.eye(3), torch.ones(2, 3), ratio)


@pytest.mark.parametrize("penalty", [0.0, -1.0, math.nan])
def test_penalty_out_of_range(penalty):
    with pytest.raises(ValueError, match="penalty must be above 0"):
        box_score(torch.eye(3), torch.ones(2, 3), 0.5, penalty=penalty)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match=r"gram must be \(3, 3\)"):
        box_score(torch.eye(4), torch.ones(2, 3), 0.5)
    with pytest.raises(ValueError, match="damping must be at least 0"):
        box_score(torch.eye(3), torch.ones(2, 3), 0.5, damping=-1)
    with pytest.raises(ValueError, match="not finite"):
        box_score(torch.full((3, 3), math.nan), torch.ones(2, 3), 0.5)
