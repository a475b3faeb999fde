import numpy as np
import pytest
import torch

from numprune.baselines import baseline_score, standardised
from numprune.statistics import Moments

CHANNELS = 7


@pytest.fixture
def x() -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.normal(size=(50, CHANNELS)) * generator.uniform(0.1, 3, CHANNELS) + generator.normal(size=CHANNELS)


@pytest.fixture
def w() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(5, CHANNELS))


def moments_of(x: np.ndarray) -> Moments:
    return Moments(torch.tensor(x.T @ x), torch.tensor(x.mean(axis=0)), len(x))


def test_magnitude(x, w):
    expected = [np.sqrt(sum(w[j, i] ** 2 for j in range(5))) for i in range(CHANNELS)]
    np.testing.assert_allclose(baseline_score("magnitude", moments_of(x), torch.tensor(w)), expected)


def test_wanda_sp(x, w):
    norms = np.sqrt((x**2).sum(axis=0))
    expected = [np.mean([abs(w[j, i]) * norms[i] for j in range(5)]) for i in range(CHANNELS)]
    np.testing.assert_allclose(baseline_score("wanda_sp", moments_of(x), torch.tensor(w)), expected)


def test_flap(x, w):
    variance = ((x - x.mean(axis=0)) ** 2).mean(axis=0)
    expected = [variance[i] * sum(w[j, i] ** 2 for j in range(5)) for i in range(CHANNELS)]
    np.testing.assert_allclose(baseline_score("flap", moments_of(x), torch.tensor(w)), expected)


def test_flap_of_a_constant_channel_is_0_and_never_below():
    x = np.full((1000, CHANNELS), 0.1)
    moments = moments_of(x)
    moments = Moments(moments.gram.float(), moments.mean.float() * (1 + 1e-6), moments.count)
    np.testing.assert_array_equal(baseline_score("flap", moments, torch.ones(5, CHANNELS)), np.zeros(CHANNELS))


def test_random_is_uniform_and_follows_the_generator():
    moments = Moments(torch.eye(5000), torch.zeros(5000), 1)
    weight = torch.ones(1, 5000)
    score = baseline_score("random", moments, weight, generator=torch.Generator().manual_seed(0))
    assert 0 <= score.min() < 0.01
    assert 0.99 < score.max() < 1
    assert abs(score.mean() - 0.5) < 0.02
    again = baseline_score("random", moments, weight, generator=torch.Generator().manual_seed(0))
    other = baseline_score("random", moments, weight, generator=torch.Generator().manual_seed(1))
    assert torch.equal(score, again)
    assert not torch.equal(score, other)


@pytest.mark.parametrize("baseline", ["random", "magnitude", "wanda_sp", "flap"])
def test_half_precision_weights_are_scored_in_double(baseline, x, w):
    score = baseline_score(baseline, moments_of(x), torch.tensor(w).bfloat16(), generator=torch.Generator())
    assert score.shape == (CHANNELS,)
    assert score.dtype == torch.float64


def test_standardised():
    scores = np.random.default_rng(2).normal(size=20) * 5 + 3
    expected = (scores - scores.mean()) / np.sqrt(((scores - scores.mean()) ** 2).mean())
    np.testing.assert_allclose(standardised(torch.tensor(scores)), expected)


@pytest.mark.parametrize("scores", [[0.1] * 3, [0.0] * 4, [2.0]])
def test_standardised_constants_are_0(scores):
    assert standardised(torch.tensor(scores, dtype=torch.float64)).tolist() == [0.0] * len(scores)


def test_bad_arguments(x, w):
    moments, weight = moments_of(x), torch.tensor(w)
    with pytest.raises(ValueError, match="generator must be given for random"):
        baseline_score("random", moments, weight)
    with pytest.raises(ValueError, match="baseline must be random, magnitude, wanda_sp or flap, got 'best'"):
        baseline_score("best", moments, weight)
    with pytest.raises(ValueError, match=r"weight \(5, 6\) must be"):
        baseline_score("magnitude", moments, weight[:, 1:])
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        baseline_score("flap", Moments(moments.gram, moments.mean, 0), weight)
