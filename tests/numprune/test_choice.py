import copy
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from numprune.allocation import Shapes
from numprune.architectures import channel_indices, linear, prunable_groups
from numprune.budget import Budget, to_remove
from numprune.choice import choose_units, rank_model
from numprune.compensation import compensate
from numprune.cutting import cut
from numprune.errors import NumpruneError
from numprune.newton import numerical_score
from numprune.pruning import capture_to
from numprune.ranking import Selection
from numprune.recipe import RECIPES, Recipe, recipe_name
from numprune.statistics import Measured
from tests.numprune.conftest import CONFIGS, choose, random_model

BEST = RECIPES["best"]
SELECTIONS = get_args(Selection)


@pytest.fixture
def measured(model, input_ids, tmp_path):
    return measure(model, input_ids, tmp_path)


@pytest.fixture
def of_llama(llama, input_ids, tmp_path):
    return measure(llama, input_ids, tmp_path)


def measure(model, input_ids, folder, batch_size=5):
    list(capture_to(folder, model, input_ids, batch_size=batch_size))
    return Measured(folder, input_ids, batch_size=batch_size)


def ranked(model, measured, recipe, ratio=0.3):
    return dict(rank_model(model, recipe, measured, ratio=ratio))


def groups_of(model):
    return [group for groups in prunable_groups(model) for group in groups]


def assert_indices(model, kept, *, least=1):
    assert list(kept) == [group.name for group in groups_of(model)]
    for group in groups_of(model):
        indices = kept[group.name].tolist()
        assert indices == sorted(set(indices))
        assert len(indices) >= least
        assert all(0 <= index < group.units for index in indices)


def share_removed(model, kept):
    groups = groups_of(model)
    return 1 - sum(len(kept[g.name]) * g.unit_parameters for g in groups) / sum(g.parameters for g in groups)


def assert_same(one, other):
    assert one.kept.keys() == other.kept.keys()
    assert all(torch.equal(one.kept[name], other.kept[name]) for name in one.kept)
    assert (one.lowest_kept, one.highest_removed) == (other.lowest_kept, other.highest_removed)
    assert one.threshold == other.threshold


# ---- One step


@pytest.mark.parametrize("allocation", ["global", "uniform", "loss_aware"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_recipe_meets_the_amount(llama, of_llama, selection, allocation):
    recipe = Recipe(selection=selection, allocation=allocation, damping="auto")
    choice = choose(llama, of_llama, 0.3, recipe)
    assert_indices(llama, choice.kept)
    assert 0.3 - 1e-9 <= share_removed(llama, choice.kept) < 0.32 + (allocation == "uniform") * 0.02


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_family(model, measured, recipe):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choice = choose(model, measured, 0.4, recipe)
    assert_indices(model, choice.kept)
    assert 0.4 - 1e-9 <= share_removed(model, choice.kept) < 0.42
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("recipe", [Recipe(), BEST], ids=["global", "loss_aware"])
def test_rankings_that_are_there_need_neither_weights_nor_statistics(llama, of_llama, tmp_path, recipe):
    rankings = ranked(llama, of_llama, recipe)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    nowhere = replace(of_llama, statistics=tmp_path / "nowhere")
    choice = choose(shapes, nowhere, 0.3, recipe, rankings=rankings)
    assert_same(choice, choose(llama, of_llama, 0.3, recipe))
    turned = {name: replace(r, scores=-r.scores, order=r.order.flip(0)) for name, r in rankings.items()}
    assert any(
        not torch.equal(units, choice.kept[name])
        for name, units in choose(shapes, nowhere, 0.3, recipe, rankings=turned).kept.items()
    )


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("allocation", ["global", "loss_aware"])
def test_scores_on_both_sides_of_the_cut_are_those_of_the_rankings(llama, of_llama, selection, allocation):
    recipe = Recipe(selection=selection, allocation=allocation)
    choice = choose(llama, of_llama, 0.3, recipe)
    for name, ranking in ranked(llama, of_llama, recipe).items():
        kept = choice.kept[name].tolist()
        gone = [unit for unit in range(len(ranking.scores)) if unit not in kept]
        assert gone == sorted(ranking.order[: len(gone)].tolist())
        assert choice.lowest_kept[name] == min(ranking.scores[unit].item() for unit in kept)
        assert choice.highest_removed[name] == max((ranking.scores[unit].item() for unit in gone), default=None)
    if allocation == "global":
        assert choice.threshold == pytest.approx(max(v for v in choice.highest_removed.values() if v is not None))


@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_literal_takes_the_quantile_of_the_masks_at_the_ratio(llama, of_llama, ratio):
    choice = choose(llama, of_llama, ratio, Recipe(allocation="literal"))
    weighted = []
    for group in groups_of(llama):
        gram = of_llama.block(group.block).moments[group.name].gram.double()
        weight = linear(llama.model.layers[group.block], group.consumer).weight
        mask = numerical_score(gram / gram.trace(), weight, ratio, damping=1e-6)
        means = mask.view(group.units, group.channels).mean(1) * group.unit_parameters / 96  # A channel: 3 * 32.
        ascending = means.argsort().tolist()
        weighted += [(means[unit].item(), group.name, unit) for unit in ascending[:-1]]
    count = -int(-ratio * sum(g.units for g in groups_of(llama)) // 1)
    gone = {(name, unit) for _, name, unit in sorted(weighted)[:count]}
    expected = {(g.name, unit) for g in groups_of(llama) for unit in range(g.units)} - gone
    assert {(name, unit) for name, units in choice.kept.items() for unit in units.tolist()} == expected


def test_shapes_reach_the_allocation(llama, of_llama):
    recipe = replace(BEST, shapes=Shapes(heads=4, channels=8, uniform=True))
    kept = choose(llama, of_llama, 0.3, recipe).kept
    assert len({len(kept[f"{block}.mlp"]) for block in range(3)}) == 1
    assert len(kept["0.mlp"]) % 8 == 0
    assert 2 * len(kept["0.attention"]) % 4 == 0
    with pytest.raises(NumpruneError, match="The budget cannot be met"):
        choose(llama, of_llama, 0.8, replace(BEST, shapes=Shapes(heads=8)))


# ---- Rises of the model's loss


def divergence(model, changed, input_ids):
    with torch.no_grad():
        p, q = (m(input_ids).logits.double().log_softmax(-1) for m in (model, changed))
    return (p.exp() * (p - q)).sum().item() / input_ids.numel()


@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"])
def test_rises_are_those_of_models_cut_in_one_place(name, depth, input_ids, tmp_path):
    model = random_model(CONFIGS[name])
    measured = measure(model, input_ids, tmp_path)
    recipe = replace(BEST, planning_tokens=8 * input_ids.shape[1] - 1, shapes=Shapes(depth=depth))  # Seven whole ones.
    for group_name, ranking in ranked(model, measured, recipe).items():
        group = next(g for g in groups_of(model) if g.name == group_name)
        moments = measured.block(group.block).moments[group.name]
        counts = {"attention": [1, 3], "mlp": [12, 28]}[group.kind] + [group.units] * depth
        highest = 0.0
        for count in counts:
            changed = copy.deepcopy(model)
            layer = linear(changed.model.layers[group.block], group.consumer)
            columns = channel_indices(ranking.order[count:].sort().values, group.channels)
            weight = torch.zeros_like(layer.weight)
            if count < group.units:
                weight[:, columns] = compensate(moments.gram, layer.weight, columns, moments.damping("auto"))
            layer.weight.data = weight.detach()
            highest = max(highest, divergence(model, changed, input_ids[:7]))
            assert ranking.rises[count].item() >= highest * (1 - 5e-3)
            if count == counts[0]:
                assert ranking.rises[count].item() == pytest.approx(highest, rel=5e-3)
        assert ranking.rises[0] == 0
        assert (ranking.rises.diff() >= 0).all()


def test_rises_are_measured_only_if_they_decide(llama, of_llama):
    for recipe in (Recipe(), Recipe(selection="obs", allocation="uniform")):
        assert all(ranking.rises is None for ranking in ranked(llama, of_llama, recipe).values())


def test_a_group_of_one_unit_stays(input_ids, tmp_path):
    settings = CONFIGS["llama"].to_dict() | {"num_key_value_heads": 1}
    model = random_model(CONFIGS["llama"].__class__(**settings))
    choice = choose(model, measure(model, input_ids, tmp_path), 0.2, BEST)
    assert all(choice.kept[f"{block}.attention"].tolist() == [0] for block in range(3))
    assert choice.highest_removed["0.attention"] is None


# ---- Several steps


@pytest.mark.parametrize(
    "recipe",
    [replace(BEST, steps=3), Recipe(steps=3), Recipe(steps=3, recovery="none"), Recipe(steps=3, recovery="bias")],
    ids=["best", "paper", "none", "bias"],
)
def test_steps_go_on_from_what_the_steps_before_left(model, measured, recipe):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    costs, amount = to_remove(model, Budget("ratio", 0.45))
    first = choose_units(model, replace(recipe, steps=1), costs, amount / 3, measured)
    second = choose_units(model, replace(recipe, steps=2), costs, 2 * amount / 3, measured)
    third = choose_units(model, recipe, costs, amount, measured)
    for wider, narrower, share in [(first, second, 0.3), (second, third, 0.45)]:
        assert_indices(model, narrower.kept)
        assert all(set(narrower.kept[name].tolist()) <= set(wider.kept[name].tolist()) for name in wider.kept)
        assert share - 1e-9 <= share_removed(model, narrower.kept) < share + 0.02
        assert narrower.threshold >= wider.threshold
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("recovery", ["least_squares", "refit"])
def test_the_second_step_ranks_the_recovered_model(llama, of_llama, input_ids, tmp_path, recovery):
    """By hand: choose, cut and recover a copy, measure it, and choose in it what is still to go."""
    recipe = replace(BEST, recovery=recovery, planning_tokens=3 * input_ids.shape[1])
    costs, amount = to_remove(llama, Budget("ratio", 0.4))
    first = choose_units(llama, recipe, costs, amount / 2, of_llama)
    halfway = copy.deepcopy(llama)
    list(cut(halfway, first.kept, of_llama, recovery=recovery, damping="auto"))
    left = amount - sum((g.units - len(first.kept[g.name])) * g.unit_parameters for g in groups_of(llama))
    of_halfway = measure(halfway, input_ids, tmp_path / "halfway")
    second = choose_units(halfway, recipe, costs, left, of_halfway)
    both = choose_units(llama, replace(recipe, steps=2), costs, amount, of_llama)
    for name, units in both.kept.items():
        assert torch.equal(units, first.kept[name][second.kept[name]])
    assert both.lowest_kept == second.lowest_kept
    for name, highest in both.highest_removed.items():
        paid = [v for v in (first.highest_removed[name], second.highest_removed[name]) if v is not None]
        assert highest == max(paid, default=None)
    assert both.threshold == max(first.threshold, second.threshold)


def test_steps_start_with_the_rankings_that_are_there(llama, of_llama):
    recipe = replace(BEST, steps=2)
    rankings = ranked(llama, of_llama, recipe, ratio=0.15)
    assert_same(choose(llama, of_llama, 0.3, recipe, rankings=rankings), choose(llama, of_llama, 0.3, recipe))


def test_whole_modules_that_went_stay_away(llama, of_llama):
    """Steps after the one that removed a module see a model without it."""
    recipe = replace(BEST, steps=3, shapes=Shapes(depth=True, heads=8, channels=40))  # All or nothing.
    choice = choose(llama, of_llama, 0.6, recipe)
    assert_indices(llama, choice.kept, least=0)
    assert {len(units) for units in choice.kept.values()} <= {0, 4, 40}
    assert share_removed(llama, choice.kept) >= 0.6 - 1e-9
    for name, units in choice.kept.items():
        assert (choice.lowest_kept[name] is None) == (not len(units))
        assert (choice.highest_removed[name] is None) == bool(len(units))


@pytest.mark.parametrize(("together", "read"), [(8, 3), (2, 4), (1, 6)])
def test_progress_is_shown_for_every_step(llama, of_llama, monkeypatch, together, read):
    """Blocks behind are read again for the trials of each few blocks that go through them together."""
    monkeypatch.setattr("numprune.choice._BLOCKS_TOGETHER", together)
    passed = Counter()

    def watch(steps, total, title):
        assert not passed[title]
        for step in steps:
            passed[title] += 1
            yield step
        assert passed[title] == total

    choose(llama, of_llama, 0.3, replace(BEST, steps=2), watch=watch)
    assert passed == {
        "step 1 of 2 rank": read,
        "step 2 of 2 recover": 3,
        "step 2 of 2 capture": 3,
        "step 2 of 2 rank": read,
    }
    passed.clear()
    choose(llama, of_llama, 0.3, replace(BEST, allocation="global"), watch=watch)
    assert passed == {"rank": 3}


# ---- Repeatable


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_two_runs_are_bit_identical(llama, of_llama, selection, steps):
    recipe = replace(BEST, selection=selection, steps=steps)
    assert_same(choose(llama, of_llama, 0.4, recipe), choose(llama, of_llama, 0.4, recipe))


@pytest.mark.parametrize("steps", [1, 2])
def test_batch_size_does_not_matter(llama, input_ids, tmp_path, steps):
    recipe = replace(BEST, steps=steps)
    choices = []
    for size in (1, 5, 12):
        measured = measure(llama, input_ids, tmp_path / str(size), batch_size=size)
        choices.append(choose(llama, measured, 0.3, recipe))
    for other in choices[1:]:
        for name, units in choices[0].kept.items():
            assert torch.equal(other.kept[name], units)
            for part in ("lowest_kept", "highest_removed"):
                found, wanted = getattr(other, part)[name], getattr(choices[0], part)[name]
                assert found == (wanted if wanted is None else pytest.approx(wanted, rel=1e-3, abs=1e-5))
        assert other.threshold == pytest.approx(choices[0].threshold, rel=1e-3)


def test_presets_have_names():
    assert recipe_name(Recipe()) == "paper"
    assert recipe_name(BEST) == "best"
    assert recipe_name(replace(BEST, steps=2)) == "custom"
