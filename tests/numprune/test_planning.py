import copy
from dataclasses import replace

import pytest
import torch

from numprune import latency
from numprune.allocation import Shapes
from numprune.architectures import all_groups, layer_widths, linear, prunable_groups
from numprune.budget import Budget, linear_costs, parse_budget
from numprune.checkpoint import load_shapes
from numprune.choice import rank_model
from numprune.cutting import cut
from numprune.errors import NumpruneError
from numprune.planning import choose_within
from numprune.pruning import capture_to
from numprune.recipe import RECIPES, Recipe
from numprune.statistics import Measured
from tests.numprune.conftest import CONFIGS, random_model

BEST = RECIPES["best"]


@pytest.fixture
def measured(model, input_ids, tmp_path):
    return measure(model, input_ids, tmp_path / "statistics")


def measure(model, input_ids, folder):
    list(capture_to(folder, model, input_ids, batch_size=6))
    return Measured(folder, input_ids, batch_size=6)


def cost(model, budget):
    """Of a model as it is, counted from its tensors."""
    costs = linear_costs(model, budget)
    return costs.total({group.name: group.units for groups in prunable_groups(model) for group in groups})


def cheapest_unit(model, budget):
    return min(linear_costs(model, budget).unit.values())


def really_cut(model, kept):
    result = copy.deepcopy(model)
    list(cut(result, kept, None, recovery="none"))
    return result


@pytest.mark.parametrize("share", [0.9, 0.7])
@pytest.mark.parametrize("kind", ["parameters", "size", "memory", "flops"])
def test_the_cut_model_is_within_the_budget_and_hardly_below(model, measured, kind, share):
    """Memory and operations with a context longer than the sliding window."""
    whole = Budget(kind, 1.0, batch=3, length=20)
    budget = replace(whole, value=share * cost(model, whole))
    for recipe in (Recipe(), BEST):
        pruned = really_cut(model, choose_within(budget, model, model, recipe, measured).kept)
        assert cost(pruned, budget) <= budget.value
        assert cost(pruned, budget) > budget.value - cheapest_unit(model, budget)
    if kind == "parameters":
        assert pruned.num_parameters() == cost(pruned, budget)


@pytest.mark.parametrize("kind", ["parameters", "size"])
def test_biases_that_recovery_adds_are_within_the_budget(llama, input_ids, tmp_path, kind):
    measured = measure(llama, input_ids, tmp_path)
    budget = Budget(kind, 0.8 * cost(llama, Budget(kind, 1.0)))
    choice = choose_within(budget, llama, llama, replace(BEST, recovery="bias"), measured)
    list(cut(llama, choice.kept, measured, recovery="bias"))
    assert linear(llama.model.layers[0], "self_attn.o_proj").bias is not None
    assert cost(llama, budget) <= budget.value
    assert cost(llama, budget) > budget.value - cheapest_unit(llama, budget)


@pytest.mark.parametrize("recipe", [Recipe(), BEST, replace(BEST, steps=2)], ids=["paper", "best", "steps"])
def test_a_ratio_is_reached(model, measured, recipe):
    budget = parse_budget("0.35")
    pruned = really_cut(model, choose_within(budget, model, model, recipe, measured).kept)
    gone = cost(model, budget) - cost(pruned, budget)
    assert gone >= 0.35 * cost(model, budget)
    assert gone - 0.35 * cost(model, budget) < cheapest_unit(model, budget)


def test_bytes_are_those_of_the_checkpoint(make_checkpoint, input_ids, tmp_path):
    """The checkpoint is in half precision, the model that is ranked in full, and from rankings alone it goes too."""
    config = CONFIGS["llama"].__class__(**CONFIGS["llama"].to_dict() | {"dtype": "bfloat16"})
    stored = load_shapes(make_checkpoint(config))
    model = random_model(CONFIGS["llama"])
    measured = measure(model, input_ids, tmp_path / "statistics")
    budget = parse_budget("size-60kB")  # In full precision the dense model has twice 80 kB.
    choice = choose_within(budget, model, stored, BEST, measured)
    assert 60_000 - 2 * 100 < cost(really_cut(model, choice.kept).bfloat16(), budget) <= 60_000
    rankings = dict(rank_model(model, BEST, measured, ratio=0.3))
    again = choose_within(budget, stored, stored, BEST, measured, rankings=rankings)
    assert all(torch.equal(again.kept[name], units) for name, units in choice.kept.items())


def test_depth_reaches_what_one_unit_in_every_group_cannot(llama, input_ids, tmp_path):
    measured = measure(llama, input_ids, tmp_path)
    budget = parse_budget("parameters-21k")
    with pytest.raises(NumpruneError, match=r"with 1 unit kept in every group the least possible is 22\.1 k"):
        choose_within(budget, llama, llama, BEST, measured)
    recipe = replace(BEST, shapes=Shapes(depth=True))
    pruned = really_cut(llama, choose_within(budget, llama, llama, recipe, measured).kept)
    assert pruned.num_parameters() <= 21_000


@pytest.mark.parametrize("kind", ["parameters", "size", "memory", "flops"])
def test_a_budget_that_the_dense_model_meets_is_refused(llama, input_ids, tmp_path, kind):
    with pytest.raises(NumpruneError, match="met without pruning"):
        choose_within(Budget(kind, 1e9), llama, llama, BEST, Measured(tmp_path, input_ids))


@pytest.mark.parametrize("text", ["parameters-30k", "size-100kB", "memory-200kB", "flops-60k", "latency-5ms"])
def test_literal_knows_ratios_alone(llama, input_ids, tmp_path, text):
    recipe = Recipe(allocation="literal")
    with pytest.raises(NumpruneError, match=f"literal knows ratios alone, got the budget {text}"):
        choose_within(parse_budget(text), llama, llama, recipe, Measured(tmp_path, input_ids))
    measured = measure(llama, input_ids, tmp_path)
    kept = choose_within(parse_budget("0.3"), llama, llama, recipe, measured).kept
    assert sum(len(units) for units in kept.values()) == 132 - 40  # 0.3 of the units, rounded up.


def test_literal_knows_no_shapes(llama, input_ids, tmp_path):
    recipe = Recipe(allocation="literal", shapes=Shapes(channels=8))
    with pytest.raises(NumpruneError, match="literal knows no shapes"):
        choose_within(parse_budget("0.3"), llama, llama, recipe, Measured(tmp_path, input_ids))


@pytest.fixture
def clock(monkeypatch):
    """Replaces the measurement by a function of the model's widths; returns the widths that were measured."""
    seen = []

    def seconds_per_token(models, _budget, _repeats):
        seconds = {}
        for name, model in models.items():
            widths = layer_widths(model)
            seen.append([tuple(layer.values()) for layer in widths])
            seconds[name] = 1e-3 + sum(
                1e-4 * layer["num_key_value_heads"] ** 1.3 + 1e-5 * layer["intermediate_size"] for layer in widths
            )
        return seconds

    monkeypatch.setattr(latency, "seconds_per_token", seconds_per_token)
    return seconds_per_token, seen


@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(selection="box"), BEST, replace(BEST, steps=2)],
    ids=["paper", "box", "best", "steps"],
)
def test_a_latency_is_met_as_measured(model, measured, clock, recipe, tmp_path):
    """With a work folder: what one attempt remembers is not for the next, which removes another amount."""
    seconds_per_token, seen = clock
    measured = replace(measured, work=tmp_path / "work")
    dense = seconds_per_token({"dense": model}, None, 1)["dense"]
    budget = Budget("latency", 0.8 * dense)
    choice = choose_within(budget, model, model, recipe, measured)
    pruned = really_cut(model, choice.kept)
    assert [tuple(layer.values()) for layer in layer_widths(pruned)] in seen
    assert 0.95 * budget.value <= seconds_per_token({"pruned": pruned}, None, 1)["pruned"] <= budget.value
    assert choice.lowest_kept.keys() == choice.kept.keys()


@pytest.mark.parametrize(
    "shapes", [Shapes(heads=4, channels=16), Shapes(heads=2, channels=32, uniform=True), Shapes(depth=True)]
)
def test_a_latency_is_met_down_to_what_the_shapes_allow(llama, input_ids, tmp_path, clock, shapes):
    seconds_per_token, _ = clock
    measured = measure(llama, input_ids, tmp_path)
    groups = all_groups(llama)
    smallest = really_cut(llama, {g.name: torch.arange(g.units - shapes.removable(g)[-1]) for g in groups})
    least = seconds_per_token({"smallest": smallest}, None, 1)["smallest"]
    recipe = replace(BEST, shapes=shapes)
    budget = Budget("latency", 1.03 * least)
    pruned = really_cut(llama, choose_within(budget, llama, llama, recipe, measured).kept)
    assert least <= seconds_per_token({"pruned": pruned}, None, 1)["pruned"] <= budget.value
    with pytest.raises(NumpruneError, match=r"cannot be met: with the fewest units that may be kept a token still"):
        choose_within(Budget("latency", 0.99 * least), llama, llama, recipe, measured)


def test_a_latency_out_of_reach_is_refused(llama, input_ids, tmp_path, clock):
    with pytest.raises(NumpruneError, match="latency-1ms cannot be met"):
        choose_within(parse_budget("latency-1ms"), llama, llama, BEST, measure(llama, input_ids, tmp_path))
    assert clock[1]
