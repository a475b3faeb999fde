import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numprune.compensation import bias_compensation, compensate


def paper_update(x: np.ndarray, w: np.ndarray, pruned: np.ndarray) -> tuple[np.ndarray, float]:
    """The paper's formula with its inverse of D x D, and its optimal loss; y = x w."""
    inverse = np.linalg.inv(2 * x.T @ x)
    selector = np.eye(len(w))[:, pruned]
    core = np.linalg.inv(selector.T @ inverse @ selector)
    update = -inverse @ selector @ core @ selector.T @ w
    loss = 0.5 * np.trace(w[pruned].T @ core @ w[pruned])
    return w + update, loss


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), channels=st.integers(2, 20), outputs=st.integers(1, 8), data=st.data())
def test_equals_the_papers_inverse_and_its_loss(seed, channels, outputs, data):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(4 * channels, channels)) @ generator.normal(size=(channels, channels))
    w = generator.normal(size=(channels, outputs))
    kept = np.sort(generator.permutation(channels)[: data.draw(st.integers(1, channels - 1))])
    pruned = np.setdiff1d(np.arange(channels), kept)
    expected, loss = paper_update(x, w, pruned)
    result = compensate(torch.tensor(x.T @ x), torch.tensor(w.T), torch.tensor(kept)).numpy().T
    scale = np.abs(expected).max()
    np.testing.assert_allclose(result, expected[kept], rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(np.linalg.norm(x[:, kept] @ result - x @ w) ** 2, loss, rtol=1e-4, atol=1e-8 * scale)


@pytest.mark.parametrize("tokens", [3, 8, 13])
def test_rank_deficient_inputs_still_give_the_least_loss(tokens):
    generator = np.random.default_rng(tokens)
    x, w = generator.normal(size=(tokens, 20)), generator.normal(size=(20, 5))
    kept = np.arange(0, 20, 2)
    result = compensate(torch.tensor(x.T @ x), torch.tensor(w.T), torch.tensor(kept)).numpy().T
    best = np.linalg.lstsq(x[:, kept], x @ w, rcond=None)[0]
    least = np.linalg.norm(x[:, kept] @ best - x @ w)
    assert np.linalg.norm(x[:, kept] @ result - x @ w) <= least + 1e-5 * np.linalg.norm(x @ w)


def test_damping_keeps_the_change_small():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    keep = torch.tensor([0, 2, 3])
    gram = x.T @ x
    gamma = 0.5 * gram[keep][:, keep].diagonal().mean() * torch.eye(3, dtype=torch.float64)
    pruned = torch.tensor([1, 4, 5])
    inverse = torch.linalg.inv(gram[keep][:, keep] + gamma)
    expected = weight[:, keep] + weight[:, pruned] @ gram[pruned][:, keep] @ inverse
    torch.testing.assert_close(compensate(gram, weight, keep, damping=0.5), expected)


def test_mask_and_indices_agree_and_order_is_kept():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 6, generator=generator), torch.randn(4, 6, generator=generator)
    gram = x.T @ x
    mask = torch.tensor([True, False, True, True, False, True])
    by_mask = compensate(gram, weight, mask)
    assert by_mask.shape == (4, 4)
    assert by_mask.dtype == weight.dtype
    torch.testing.assert_close(compensate(gram, weight, torch.tensor([0, 2, 3, 5])), by_mask)
    torch.testing.assert_close(compensate(gram, weight, torch.tensor([5, 3, 2, 0])), by_mask.flip(1))


def test_keeping_all_changes_nothing():
    weight = torch.randn(4, 6)
    torch.testing.assert_close(compensate(torch.eye(6), weight, torch.arange(6)), weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.tensor([], dtype=torch.long), "keep is empty"),
        (torch.zeros(3, dtype=torch.bool), "keep is empty"),
        (torch.tensor([0, 3]), r"keep must lie in \[0, 3\)"),
        (torch.tensor([-1, 0]), r"keep must lie in \[0, 3\)"),
        (torch.tensor([1, 1]), "keep holds an index twice"),
        (torch.ones(4, dtype=torch.bool), r"a boolean keep must be \(3,\)"),
    ],
)
def test_bad_keep(keep, message):
    with pytest.raises(ValueError, match=message):
        compensate(torch.eye(3), torch.ones(2, 3), keep)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), channels=st.integers(2, 20), outputs=st.integers(1, 8), data=st.data())
def test_bias_equals_the_mean_over_tokens(seed, channels, outputs, data):
    generator = np.random.default_rng(seed)
    x, w = generator.normal(size=(30, channels)) + 1, generator.normal(size=(channels, outputs))
    kept = np.sort(generator.permutation(channels)[: data.draw(st.integers(1, channels))])
    pruned = np.setdiff1d(np.arange(channels), kept)
    expected = (x[:, pruned] @ w[pruned]).mean(0)
    result = bias_compensation(torch.tensor(x.mean(0)), torch.tensor(w.T), torch.tensor(kept))
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)


def test_bias_has_the_weights_type_and_loses_nothing_before():
    """Large terms of opposite sign cancel, which sums in half precision do not survive."""
    mean, weight = torch.tensor([1000.0, 1000.0, 0.25, 7.0]), torch.tensor([[1.0, -1.0, 1.0, 3.0]]).bfloat16()
    mask = torch.tensor([False, False, False, True])
    result = bias_compensation(mean, weight, mask)
    assert result.dtype == torch.bfloat16
    assert result.tolist() == [0.25]
    assert torch.equal(bias_compensation(mean, weight, torch.tensor([3])), result)


def test_bias_refuses_a_mean_of_another_size():
    with pytest.raises(ValueError, match=r"mean must be \(3,\)"):
        bias_compensation(torch.ones(4), torch.ones(2, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="keep is empty"):
        bias_compensation(torch.ones(3), torch.ones(2, 3), torch.tensor([], dtype=torch.long))
