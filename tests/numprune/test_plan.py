import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from numprune.architectures import all_groups
from numprune.errors import NumpruneError
from numprune.plan import FORMAT, PruningPlan, Source, _from_ranges, make_plan, to_ranges
from numprune.ranking import Ranking
from numprune.recipe import Recipe
from numprune.statistics import Measured
from tests.numprune.conftest import choose

SOURCE = Source("models/dense", None, "a" * 64, "b" * 64)


@pytest.fixture
def groups(llama):
    return all_groups(llama)


@pytest.fixture
def plan(llama, groups, input_ids, tmp_path):
    generator = torch.Generator().manual_seed(0)
    scores = {group.name: torch.randn(group.units, generator=generator) for group in groups}
    rankings = {name: Ranking(score, score.argsort()) for name, score in scores.items()}
    choice = choose(llama, Measured(tmp_path, input_ids), 0.4, rankings=rankings)
    return make_plan(groups, choice, "0.4", source=SOURCE, recipe=Recipe())


def test_a_file_brings_the_plan_back(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded.groups == plan.groups
    assert loaded.source == plan.source
    assert loaded.achieved_ratio == plan.achieved_ratio
    assert (loaded.budget, loaded.threshold) == (plan.budget, plan.threshold)


def test_the_file_says_what_a_reader_asks(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert content["format"] == FORMAT
    assert content["budget"] == "0.4"
    assert content["achieved_ratio"] == pytest.approx(0.4, abs=0.02)
    assert content["parameters"] == {"dense": plan.dense_parameters, "pruned": plan.kept_parameters}
    assert content["recipe"] == {
        "selection": "newton",
        "allocation": "global",
        "recovery": "least_squares",
        "steps": 1,
        "planning_tokens": 4096,
        "shapes": {"heads": 1, "channels": 1, "uniform": False, "depth": False},
        "penalty": "inf",
        "damping": 1e-6,
        "seed": 0,
    }
    for group in content["groups"].values():
        assert group["highest_removed"] is None or group["highest_removed"] <= content["threshold"]


def test_a_group_may_keep_nothing(plan, tmp_path):
    gone = replace(plan.groups["1.mlp"], kept=(), lowest_kept=None)
    without = replace(plan, groups={**plan.groups, "1.mlp": gone})
    path = tmp_path / "plan.json"
    without.save(path)
    written = json.loads(path.read_text(encoding="utf-8"))["groups"]["1.mlp"]
    assert (written["kept"], written["kept_units"], written["lowest_kept"]) == ("", 0, None)
    loaded = PruningPlan.load(path)
    assert loaded.groups == without.groups
    assert loaded.kept("1.mlp").dtype == torch.long
    removed = len(plan.groups["1.mlp"].kept) * gone.unit_parameters
    assert plan.kept_parameters - loaded.kept_parameters == removed


@given(st.sets(st.integers(0, 99)))
def test_ranges_are_lossless(indices):
    ascending = sorted(indices)
    assert _from_ranges(to_ranges(ascending), 100) == tuple(ascending)


def test_ranges_read_well():
    assert to_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_another_model_is_refused(plan, groups):
    plan.check_fits(groups)
    with pytest.raises(NumpruneError, match="made for models/dense"):
        plan.check_fits(groups[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"groups": {"0.mlp": {"units": 4}}}, "no pruning plan"),
        ({"source": {}}, "no pruning plan"),
    ],
)
def test_a_damaged_file_is_refused(plan, tmp_path, change, message):
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(NumpruneError, match=message):
        PruningPlan.load(path)


@pytest.mark.parametrize("kept", ["3-1", "0,0", "0-40", "a", "2,1", "1,"])
def test_kept_units_must_be_ascending_and_in_range(kept):
    with pytest.raises(ValueError, match=r"kept units|invalid literal"):
        _from_ranges(kept, 40)
