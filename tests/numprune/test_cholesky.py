import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numprune import cholesky as module
from numprune.cholesky import cholesky, shrinkage, solve


def oracle_approximating(x: np.ndarray) -> float:
    """The weight of the identity by Chen et al. (2010), eq. 23, from the sample covariance's eigenvalues."""
    n, p = x.shape
    values = np.linalg.eigvalsh(x.T @ x / n)
    trace, trace_of_square = values.sum(), (values**2).sum()
    upper = (1 - 2 / p) * trace_of_square + trace**2
    lower = (n + 1 - 2 / p) * (trace_of_square - trace**2 / p)
    return min(upper / lower, 1)


@pytest.fixture
def narrow_panels(monkeypatch):
    monkeypatch.setattr(module, "_PANEL", 8)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 29])
@pytest.mark.usefixtures("narrow_panels")
def test_the_factor_is_that_of_lapack(size):
    x = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    matrix = x @ x.T
    before = matrix.clone()
    factor, info = cholesky(matrix)
    assert info == 0
    torch.testing.assert_close(factor, torch.linalg.cholesky(matrix), rtol=1e-10, atol=1e-12)
    assert factor.stride() == torch.linalg.cholesky(matrix).stride()
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("at", [0, 7, 8, 20])
@pytest.mark.usefixtures("narrow_panels")
def test_a_matrix_that_is_not_definite_is_said_to_be(at):
    matrix = torch.eye(21, dtype=torch.float64)
    matrix[at, at] = -1
    assert cholesky(matrix)[1] > 0


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 300), size=st.integers(2, 20))
def test_shrinkage_is_the_oracle_approximating_one(seed, tokens, size):
    """Mixed with the identity by weight w, a covariance is damped by w / (1 - w) of its mean diagonal."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(tokens, size)) * generator.uniform(0.1, 3, size)
    weight = min(oracle_approximating(x), 0.5)
    assert shrinkage(torch.tensor(x.T @ x), tokens) == pytest.approx(weight / (1 - weight), rel=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 50), size=st.integers(1, 20), scale=st.floats(1e-6, 1e6))
def test_shrinkage_lies_between_0_and_1_whatever_the_scale(seed, tokens, size, scale):
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = x.T @ x
    damping = shrinkage(gram, tokens)
    assert 0 <= damping <= 1
    if size > 1:
        assert shrinkage(scale * gram, tokens) == pytest.approx(damping, rel=1e-6)


def test_many_tokens_need_no_damping():
    generator = torch.Generator().manual_seed(0)
    deviations = torch.linspace(0.1, 3, 16, dtype=torch.float64)
    dampings = []
    for tokens in (20, 200, 2000, 200_000):
        x = torch.randn(tokens, 16, generator=generator, dtype=torch.float64) * deviations
        dampings.append(shrinkage(x.T @ x, tokens))
    assert dampings == sorted(dampings, reverse=True)
    assert dampings[0] > 0.05
    assert dampings[-1] < 1e-3


def test_fewer_tokens_behind_the_same_moments_need_more():
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    gram = x.T @ x
    assert shrinkage(gram, 10) > shrinkage(gram, 100) > shrinkage(gram, 1000) > 0


def test_shrinkage_takes_stored_moments_as_they_are():
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = x.T @ x
    before = gram.float()
    assert shrinkage(before, 100) == pytest.approx(shrinkage(gram, 100), rel=1e-4)
    assert torch.equal(before, gram.float())


@pytest.mark.parametrize("gram", [torch.zeros(4, 4), torch.eye(4), 3 * torch.eye(1)])
def test_nothing_to_shrink(gram):
    """Zeros and multiples of the identity are as near to it as they can be."""
    assert shrinkage(gram, 10) == 0


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 40), columns=st.integers(1, 50))
def test_solutions_are_those_of_the_matrix(seed, size, columns):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2 * size + 5, generator=generator, dtype=torch.float64)
    right = torch.randn(size, columns, generator=generator, dtype=torch.float64)
    matrix = x @ x.T
    torch.testing.assert_close(solve(cholesky(matrix)[0], right), torch.linalg.solve(matrix, right))
