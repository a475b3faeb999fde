import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numprune.obs import loss_curve, removal_order

SEEDS = st.integers(0, 2**31)


def problem(seed: int, inputs: int, outputs: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs (tokens, D) and a weight (D_out, D)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(5 * inputs, inputs, generator=generator, dtype=torch.float64) @ mixing
    return x, torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)


def inputs_of(units, channels: int) -> list[int]:
    return [unit * channels + channel for unit in units for channel in range(channels)]


def lost(x: torch.Tensor, weight: torch.Tensor, gone, channels: int = 1) -> float:
    """The squared error that least squares on the inputs that stay leaves, from the whole matrix of inputs."""
    pruned = inputs_of(gone, channels)
    stays = [i for i in range(x.shape[1]) if i not in pruned]
    y = x @ weight.T
    if not stays:
        return y.square().sum().item()
    return (x[:, stays] @ torch.linalg.lstsq(x[:, stays], y).solution - y).square().sum().item()


def damped(x: torch.Tensor, damping: float) -> torch.Tensor:
    """Rows whose second moments are those of x with the damping on their diagonal."""
    gamma = damping * x.square().sum(0).mean()
    return torch.cat([x, gamma.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])


def greedy(x: torch.Tensor, weight: torch.Tensor, channels: int, at_once: int) -> list[int]:
    """Tries every unit that is left, refitting all others each time; the cheapest go."""
    order: list[int] = []
    left = list(range(x.shape[1] // channels))
    while left:
        best = sorted(left, key=lambda unit: lost(x, weight, [*order, unit], channels))[:at_once]
        order += best
        left = [unit for unit in left if unit not in best]
    return order


@settings(deadline=None, max_examples=30)
@given(
    seed=SEEDS,
    units=st.integers(1, 7),
    channels=st.integers(1, 3),
    at_once=st.integers(1, 4),
    damping=st.sampled_from([0.0, 1e-2, 0.3]),
)
def test_order_is_that_of_refitting_after_every_round(seed, units, channels, at_once, damping):
    x, weight = problem(seed, units * channels)
    order = removal_order(x.T @ x, weight, channels=channels, damping=damping, at_once=at_once)
    assert order.tolist() == greedy(damped(x, damping), weight, channels, at_once)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, units=st.integers(1, 7), channels=st.integers(1, 3), damping=st.sampled_from([0.0, 1e-3, 0.5]))
def test_losses_are_those_of_least_squares_in_any_order(seed, units, channels, damping):
    """With damping, of least squares on rows that are extended by the ridge's."""
    x, weight = problem(seed, units * channels)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    curve = loss_curve(x.T @ x, weight, order, channels=channels, damping=damping)
    rows = damped(x, damping)
    whole = (rows @ weight.T).square().sum().item()
    expected = [lost(rows, weight, order[:count].tolist(), channels) / whole for count in range(units + 1)]
    assert curve.dtype == torch.float64
    torch.testing.assert_close(curve, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-10)
    assert curve[0] == 0
    assert curve[-1] == pytest.approx(1)
    assert (curve.diff() >= 0).all()


@pytest.mark.parametrize("channels", [1, 2])
def test_the_first_to_go_is_the_best_of_all(channels):
    x, weight = problem(0, 12)
    losses = [lost(x, weight, [unit], channels) for unit in range(12 // channels)]
    first = removal_order(x.T @ x, weight, channels=channels)[0]
    assert losses[first] == min(losses)
    assert losses[first] < sorted(losses)[1]


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, inputs=st.integers(2, 6))
def test_greedy_against_every_subset(seed, inputs):
    """The optimum is never above it; of single removals and of all but none it is the optimum."""
    x, weight = problem(seed, inputs)
    gram = x.T @ x
    curve = loss_curve(gram, weight, removal_order(gram, weight))
    whole = (x @ weight.T).square().sum().item()
    best = [
        min(lost(x, weight, gone) for gone in itertools.combinations(range(inputs), count)) / whole
        for count in range(inputs + 1)
    ]
    for reached, optimum in zip(curve.tolist(), best, strict=True):
        assert reached >= optimum - 1e-9
    assert curve[1].item() == pytest.approx(best[1], rel=1e-6, abs=1e-10)
    assert curve[-1].item() == pytest.approx(best[-1])


def test_greedy_sees_what_single_costs_do_not():
    """Two inputs are nearly the same: either can go for nothing, both cannot."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    x[:, 1] = x[:, 0] + 1e-3 * x[:, 1]
    weight = torch.tensor([[3.0, 3.0, 1.0, 1.5]], dtype=torch.float64)
    order = removal_order(x.T @ x, weight).tolist()
    assert order[0] in {0, 1}
    assert order[1:] == [2, 3, 1 - order[0]]


@pytest.mark.parametrize(("units", "channels", "at_once"), [(10, 1, 3), (10, 2, 4), (7, 1, 7), (7, 3, 100), (1, 2, 2)])
def test_several_at_once_are_still_all_units_once(units, channels, at_once):
    x, weight = problem(1, units * channels)
    gram = x.T @ x
    order = removal_order(gram, weight, channels=channels, at_once=at_once)
    assert sorted(order.tolist()) == list(range(units))
    single = torch.tensor([lost(x, weight, [unit], channels) for unit in range(units)])
    assert order[:at_once].tolist() == single.argsort()[:at_once].tolist()  # Those that go together are the cheapest.


def test_scale_and_type_do_not_matter():
    x, weight = problem(2, 12)
    gram = x.T @ x
    order = removal_order(gram, weight, channels=2)
    assert torch.equal(removal_order((1e6 * gram).float(), 1e-3 * weight.float(), channels=2), order)
    curve = loss_curve((1e6 * gram).float(), 1e-3 * weight.float(), order, channels=2)
    torch.testing.assert_close(curve, loss_curve(gram, weight, order, channels=2), rtol=1e-3, atol=1e-5)


def test_arguments_stay_as_they_are():
    x, weight = problem(3, 6)
    gram = x.T @ x
    copies = gram.clone(), weight.clone()
    order = removal_order(gram, weight, damping=0.1)
    loss_curve(gram, weight, order, damping=0.1)
    assert torch.equal(gram, copies[0])
    assert torch.equal(weight, copies[1])


def test_inputs_that_are_always_zero_go_first_and_for_nothing():
    x, weight = problem(4, 8)
    x[:, 2:4] = 0
    gram = x.T @ x
    order = removal_order(gram, weight, channels=2)
    assert order[0] == 1
    assert loss_curve(gram, weight, order, channels=2)[1].item() == pytest.approx(0, abs=1e-6)


def test_a_weight_of_zeros_loses_nothing():
    x, _ = problem(5, 4)
    weight = torch.zeros(2, 4)
    order = removal_order(x.T @ x, weight)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert loss_curve(x.T @ x, weight, order).tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("gram", "weight", "options", "message"),
    [
        (torch.eye(4), torch.ones(2, 3), {}, r"gram \(4, 4\) and weight \(2, 3\) must be \(D, D\)"),
        (torch.eye(3), torch.ones(3), {}, r"weight \(3,\) must be"),
        (torch.eye(4), torch.ones(2, 4), {"channels": 3}, "channels must be a divisor of 4, got 3"),
        (torch.eye(4), torch.ones(2, 4), {"channels": 0}, "channels must be a divisor of 4, got 0"),
        (torch.eye(4), torch.ones(2, 4), {"damping": -1.0}, "damping must be at least 0"),
        (torch.full((4, 4), torch.nan), torch.ones(2, 4), {"subject": "G of x"}, "G of x is not finite"),
    ],
)
def test_bad_arguments(gram, weight, options, message):
    with pytest.raises(ValueError, match=message):
        removal_order(gram, weight, **options)
    with pytest.raises(ValueError, match=message):
        loss_curve(gram, weight, torch.arange(weight.shape[-1]), **options)


def test_bad_at_once():
    with pytest.raises(ValueError, match="at_once must be at least 1, got 0"):
        removal_order(torch.eye(4), torch.ones(2, 4), at_once=0)
