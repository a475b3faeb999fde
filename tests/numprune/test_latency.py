from itertools import pairwise

import pytest
import torch

from numprune import latency
from numprune.architectures import all_groups, layer_widths
from numprune.budget import Budget, parse_budget
from numprune.errors import NumpruneError
from numprune.generation_benchmark import Timing
from numprune.latency import measured_costs, meet_latency, seconds_per_token
from numprune.plan import Choice


def straight(attention, mlp):
    return 1e-3 + 1e-4 * attention + 5e-5 * mlp


def bent(attention, mlp):
    """Wide layers cost more per unit: the first units that go bring more than the later ones."""
    return 1e-3 + 1e-5 * attention**2 + 6e-7 * mlp**2


def flat_at_first(attention, mlp):
    """The first units that go bring next to nothing."""
    return 1e-3 + 3e-3 * (attention / 12) ** 0.3 + 5e-3 * (mlp / 120) ** 0.3


def in_steps(attention, mlp):
    return 1e-3 + 1e-4 * (attention // 2) + 1e-4 * (mlp // 2)


@pytest.fixture
def measured(monkeypatch):
    """Replaces the clock by a function of the units in all attention and all MLP groups; returns what was measured."""

    def use(function):
        counts = []

        def measure(models, _budget, _repeats):
            seconds = {}
            for name, model in models.items():
                widths = layer_widths(model)
                attention = sum(layer["num_key_value_heads"] for layer in widths)
                mlp = sum(layer["intermediate_size"] for layer in widths)
                counts.append((attention, mlp))
                seconds[name] = function(attention, mlp)
            return seconds

        monkeypatch.setattr(latency, "seconds_per_token", measure)
        return counts

    return use


def evenly(model):
    """A choice that takes about the same share from every group, and the amounts that it was asked for."""
    asked = []
    groups = all_groups(model)
    order = sorted((unit / group.units, group.name) for group in groups for unit in range(1, group.units))

    def choose(costs, amount):
        asked.append(amount)
        assert 0 < amount <= sum(costs.unit[name] for _, name in order)
        count = {group.name: group.units for group in groups}
        for _, name in reversed(order):
            if amount > 0:
                count[name] -= 1
                amount -= costs.unit[name]
        return Choice({name: torch.arange(units) for name, units in count.items()}, {}, {}, 0.0)

    return choose, asked


def reached(function, kept):
    count = {
        kind: sum(len(units) for name, units in kept.items() if name.endswith(kind)) for kind in ("attention", "mlp")
    }
    return function(count["attention"], count["mlp"])


def test_every_model_is_measured_for_the_whole_batch(llama, monkeypatch):
    shapes = []
    llama.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    monkeypatch.setattr(latency, "NEW_TOKENS", 3)
    seconds = seconds_per_token({"a": llama}, Budget("latency", 1.0, batch=2, length=5), repeats=1)
    assert shapes == [(2, 5), (2, 1), (2, 1)] * 2  # One generation warms up.
    assert seconds.keys() == {"a"}
    assert seconds["a"] > 0


def test_seconds_per_token_is_the_median(llama, monkeypatch):
    timings = [("a", 1.0), ("b", 4.0), ("a", 90.0), ("b", 4.0), ("a", 2.0), ("b", 5.0)]
    timings = [(name, Timing(0.5, total, 64, 1, 1)) for name, total in timings]
    monkeypatch.setattr(latency, "timed_generations", lambda *_, **__: iter(timings))
    seconds = seconds_per_token({"a": llama, "b": llama}, parse_budget("latency-1s"), repeats=3)
    assert seconds == {"a": 2.0 / latency.NEW_TOKENS, "b": 4.0 / latency.NEW_TOKENS}


def test_real_clock_gives_usable_costs(llama, monkeypatch):
    monkeypatch.setattr(latency, "NEW_TOKENS", 2)
    costs = measured_costs(llama, Budget("latency", 1.0, length=4), repeats=1)
    assert all(cost > 0 for cost in costs.unit.values())
    assert costs.total(dict.fromkeys(costs.unit, 1)) < costs.total(dict.fromkeys(costs.unit, 2))


def test_costs_of_a_linear_latency_are_exact(llama, measured):
    counts = measured(straight)
    costs = measured_costs(llama, parse_budget("latency-5ms"))
    assert counts == [(12, 120), (6, 120), (12, 60)]
    assert costs.fixed == pytest.approx(1e-3)
    for name, cost in costs.unit.items():
        assert cost == pytest.approx(1e-4 if name.endswith("attention") else 5e-5)


def test_units_that_cost_nothing_still_have_a_positive_cost(llama, measured):
    measured(lambda attention, mlp: 5e-3 - 1e-5 * attention + 1e-5 * mlp)
    costs = measured_costs(llama, parse_budget("latency-5ms"))
    assert 0 < costs.unit["0.attention"] < 1e-4 * costs.unit["0.mlp"]
    dense = {group.name: group.units for group in all_groups(llama)}
    assert costs.total(dense) == pytest.approx(5e-3 - 1e-5 * 12 + 1e-5 * 120)


@pytest.mark.parametrize("function", [straight, bent, flat_at_first, in_steps])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_latency_is_met_and_nearly_used_up(llama, measured, function, share):
    dense, smallest = function(12, 120), function(3, 3)
    budget = Budget("latency", smallest + share * (dense - smallest))
    measured(function)
    choose, asked = evenly(llama)
    kept = meet_latency(llama, budget, choose).kept
    assert 0.95 * budget.value <= reached(function, kept) <= budget.value
    assert len(asked) <= 5


def test_search_ends_with_the_slowest_model_within_the_budget(llama, measured):
    """Two speeds only: nothing is within 5 % of the budget, so the attempts run out."""
    counts = measured(lambda _, mlp: 8e-3 if mlp > 60 else 3e-3 + 1e-5 * mlp)
    choose, asked = evenly(llama)
    kept = meet_latency(llama, Budget("latency", 5e-3), choose, attempts=4).kept
    assert len(asked) == 4
    within = [mlp for _, mlp in counts[4:] if mlp <= 60]
    assert sum(len(units) for name, units in kept.items() if name.endswith("mlp")) == max(within)


def test_each_amount_lies_between_those_that_missed_the_budget_on_either_side(llama, measured):
    counts = measured(flat_at_first)
    choose, asked = evenly(llama)
    budget = Budget("latency", 7.5e-3)
    meet_latency(llama, budget, choose)
    seconds = [flat_at_first(*count) for count in counts[4:]]
    assert len(asked) > 1
    for (amount, took), (following, _) in pairwise(zip(asked, seconds, strict=True)):
        assert (following > amount) == (took > budget.value)


def test_the_smallest_model_is_checked_before_any_search(llama, measured):
    counts = measured(straight)
    choose, asked = evenly(llama)
    with pytest.raises(NumpruneError, match=r"latency-1ms cannot be met: .* takes 1.45 ms at batch 1"):
        meet_latency(llama, parse_budget("latency-1ms"), choose)
    assert counts == [(3, 3)]
    assert not asked


def test_a_budget_that_the_dense_model_meets(llama, measured):
    measured(straight)
    choose, _ = evenly(llama)
    with pytest.raises(NumpruneError, match=r"the dense model comes to 8\.2 ms, 1\.8 ms below"):
        meet_latency(llama, parse_budget("latency-10ms"), choose)


def test_no_attempt_meets_the_budget(llama, measured):
    measured(flat_at_first)
    choose, _ = evenly(llama)
    with pytest.raises(NumpruneError, match="not met in 1 attempts"):
        meet_latency(llama, Budget("latency", 7.5e-3), choose, attempts=1)


def test_programming_errors(llama):
    choose, _ = evenly(llama)
    with pytest.raises(ValueError, match="kind latency, got size"):
        measured_costs(llama, parse_budget("size-8MB"))
    with pytest.raises(ValueError, match="attempts must be at least 1, got 0"):
        meet_latency(llama, parse_budget("latency-5ms"), choose, attempts=0)


def test_the_model_stays_as_it_is(llama, measured):
    measured(straight)
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    choose, _ = evenly(llama)
    meet_latency(llama, parse_budget("latency-5ms"), choose)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
