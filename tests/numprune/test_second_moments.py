import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from numprune import second_moments
from numprune.second_moments import SecondMoments, products


@pytest.fixture(autouse=True)
def narrow_stripes(monkeypatch):
    monkeypatch.setattr(second_moments, "_STRIPE", 8)


@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_the_sum_over_batches_is_that_of_float64(size, batches, dtype):
    generator = torch.Generator().manual_seed(size)
    rows = [torch.randn(7, size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(batches)]
    moments = SecondMoments(size, torch.device("cpu"))
    for batch in rows:
        moments.add(products(batch))
    exact = torch.cat(rows).double()
    found = moments.total()
    assert found.dtype == torch.float64
    assert (found - exact.T @ exact).norm() <= (1e-12 if dtype == torch.float64 else 1e-6) * found.norm()


def test_what_is_above_the_diagonal_is_not_computed_twice():
    stripes = products(torch.randn(5, 20))
    assert [tuple(stripe.shape) for stripe in stripes] == [(20, 8), (12, 8), (4, 4)]
