import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numprune.newton import newton_direction, numerical_score


def inputs(seed: int, tokens: int, channels: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(channels, channels))
    return generator.normal(size=(tokens, channels)) @ mixing, generator.normal(size=(channels, outputs))


def paper_iteration(x: np.ndarray, w: np.ndarray, ratio: float, penalty: float, steps: int = 50) -> np.ndarray:
    """Newton's method as the paper runs it, with an explicit Hessian, from z = 0; y = x w."""
    channels = len(w)
    kept = (1 - ratio) * channels
    a = (w @ w.T) * (x.T @ x)
    z = np.zeros(channels)
    hessian = a + penalty * np.ones((channels, channels))
    for _ in range(steps):
        gradient = a @ (z - 1) + penalty * (z.sum() - kept)
        z = z - np.linalg.solve(hessian, gradient)
    return z


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.integers(2, 24),
    outputs=st.integers(1, 16),
    ratio=st.floats(0.01, 0.99),
    penalty=st.floats(1e-2, 1e3),
)
def test_score_is_where_the_papers_iteration_ends(seed, channels, outputs, ratio, penalty):
    x, w = inputs(seed, 4 * channels, channels, outputs)
    x /= np.linalg.norm(x)
    score = numerical_score(torch.tensor(x.T @ x), torch.tensor(w.T), ratio, penalty)
    expected = paper_iteration(x, w, ratio, penalty)
    np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 2**32 - 1), ratio=st.floats(0.01, 0.99))
def test_infinite_penalty_is_the_limit_and_meets_the_budget(seed, ratio):
    x, w = inputs(seed, 100, 12, 7)
    gram, weight = torch.tensor(x.T @ x), torch.tensor(w.T)
    score = numerical_score(gram, weight, ratio)
    torch.testing.assert_close(score.sum().item(), (1 - ratio) * 12)
    nearly = numerical_score(gram, weight, ratio, penalty=1e9 * gram.trace().item())
    torch.testing.assert_close(score, nearly, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score, numerical_score(1e6 * gram, weight, ratio))


@pytest.mark.parametrize("tokens", [1, 5, 15])
def test_rank_deficient_inputs_are_damped_and_said_so(tokens, caplog):
    x, w = inputs(tokens, tokens, 16, 1)
    gram, weight = torch.tensor(x.T @ x), torch.tensor(w.T)
    direction, damping = newton_direction(gram, weight, subject="the test's matrix")
    assert damping > 0
    assert "the test's matrix is near-singular" in caplog.text
    a = (w @ w.T) * (x.T @ x)
    u = np.linalg.solve(a + damping * np.diag(a).mean() * np.eye(16), np.ones(16))
    np.testing.assert_allclose(direction, 16 * u / u.sum(), rtol=1e-3, atol=1e-3)


def test_dead_channels_go_first():
    x, w = inputs(0, 100, 10, 6)
    x[:, 3] = 0
    w[7] = 0
    score = numerical_score(torch.tensor(x.T @ x), torch.tensor(w.T), 0.5)
    assert set(score.argsort()[:2].tolist()) == {3, 7}


def test_half_precision_weights_are_scored_in_double():
    x, w = inputs(0, 100, 10, 6)
    weight = torch.tensor(w.T).bfloat16()
    gram = torch.tensor(x.T @ x).float()
    torch.testing.assert_close(numerical_score(gram, weight, 0.3), numerical_score(gram.double(), weight.double(), 0.3))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, math.nan])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\)"):
        numerical_score(torch.eye(3), torch.ones(2, 3), ratio)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match=r"gram must be \(3, 3\)"):
        numerical_score(torch.eye(4), torch.ones(2, 3), 0.5)
    with pytest.raises(ValueError, match="penalty must be above 0"):
        numerical_score(torch.eye(3), torch.ones(2, 3), 0.5, penalty=0)
    with pytest.raises(ValueError, match="damping must be at least 0"):
        numerical_score(torch.eye(3), torch.ones(2, 3), 0.5, damping=-1)
    with pytest.raises(ValueError, match="not finite"):
        numerical_score(torch.full((3, 3), math.nan), torch.ones(2, 3), 0.5)
