"""The model that ships with the repository, pruned with the library as the demo does it."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from numprune.architectures import all_groups
from numprune.budget import parse_budget
from numprune.calibration import draw_samples, evaluation_windows
from numprune.checkpoint import fingerprint, load_model
from numprune.perplexity import perplexity, window_losses
from numprune.plan import Source, make_plan
from numprune.planning import choose_within
from numprune.pruning import apply_plan, capture_to
from numprune.recipe import RECIPES
from numprune.statistics import Measured
from tasks.corpus import write_corpus
from tasks.parameters import load_parameters

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "reference-llama"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    corpus = load_parameters(ROOT / "params.yaml").corpus
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(corpus.calibration, folder / "calibration.jsonl", seed=corpus.seed)
    write_corpus(corpus.evaluation, folder / "evaluation.jsonl", seed=corpus.seed)
    return folder


@pytest.fixture(scope="module")
def windows(texts):
    return evaluation_windows(str(texts / "evaluation.jsonl"), str(MODEL), max_tokens=8192)[0]


@pytest.fixture(scope="module")
def dense():
    return load_model(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def measured(dense, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    input_ids = draw_samples(str(texts / "calibration.jsonl"), str(MODEL), samples=32)
    list(capture_to(folder, dense, input_ids, batch_size=8))
    return Measured(folder, input_ids, batch_size=8)


def quality(model, windows):
    return perplexity(torch.cat(list(window_losses(model, windows))), windows.length).perplexity


@pytest.fixture(scope="module")
def dense_quality(dense, windows):
    return quality(dense, windows)


def test_it_is_really_trained(dense_quality):
    """A model that knows nothing but the frequencies of tokens is above 500."""
    assert dense_quality < 30


def planned(dense, measured, recipe, budget):
    groups = all_groups(dense)
    choice = choose_within(parse_budget(budget), dense, dense, recipe, measured)
    return make_plan(groups, choice, budget, source=Source("", None, fingerprint(MODEL), ""), recipe=recipe)


def pruned_by(plan, dense, measured, recipe, recovery=None):
    pruned = copy.deepcopy(dense)
    list(apply_plan(pruned, plan, measured, recovery=recovery or recipe.recovery, damping=recipe.damping))
    return pruned


@pytest.mark.parametrize("budget", ["0.2", "0.5"])
def test_compensation_pays(dense, dense_quality, windows, measured, budget):
    """The paper's ordering, and the recovery that goes beyond it."""
    recipe = RECIPES["paper"]
    plan = planned(dense, measured, recipe, budget)
    assert plan.achieved_ratio == pytest.approx(float(budget), abs=0.01)
    reached = {
        recovery: quality(pruned_by(plan, dense, measured, recipe, recovery), windows)
        for recovery in ("none", "least_squares", "refit")
    }
    assert dense_quality < reached["refit"] < reached["least_squares"] < reached["none"]


def test_the_best_recipe_clearly_beats_the_papers(dense, dense_quality, windows, measured):
    """A fifth of the layers gone, 16 sequences to plan with and to refit to: less than half as many nats are lost."""
    few = replace(measured, samples=measured.samples[:16])
    nats = math.log(dense_quality)
    lost = {}
    for name in ("paper", "best"):
        recipe = RECIPES[name]
        plan = planned(dense, few, recipe, "0.2")
        assert plan.achieved_ratio == pytest.approx(0.2, abs=0.01)
        lost[name] = math.log(quality(pruned_by(plan, dense, few, recipe), windows)) - nats
    assert 0 < lost["best"] < lost["paper"] / 2
