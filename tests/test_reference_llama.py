"""The model that ships with the repository, pruned with the library as the demo does it."""

import copy
from pathlib import Path

import pytest
import torch

from numprune.architectures import prunable_groups
from numprune.calibration import draw_samples, evaluation_windows
from numprune.checkpoint import fingerprint, load_model
from numprune.perplexity import perplexity, window_losses
from numprune.plan import Source, make_plan
from numprune.pruning import Measured, Recipe, apply_plan, capture_to, score_directions, scores_at
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
    return evaluation_windows(str(texts / "evaluation.jsonl"), str(MODEL), max_tokens=16384)[0]


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
    return perplexity(torch.cat(list(window_losses(model, windows))), windows.shape[1]).perplexity


def test_it_is_really_trained(dense, windows):
    """A model that knows nothing but the frequencies of tokens is above 500."""
    assert quality(dense, windows) < 30


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_compensation_pays(dense, windows, measured, ratio):
    """The paper's ordering, and the recovery that goes beyond it."""
    recipe = Recipe()
    groups = [group for block in prunable_groups(dense) for group in block]
    scores = scores_at(dict(score_directions(dense, measured.statistics, recipe)), ratio)
    plan = make_plan(groups, scores, ratio, source=Source("", None, fingerprint(MODEL), ""), recipe={})
    assert plan.achieved_ratio == pytest.approx(ratio, abs=0.01)
    reached = {}
    for recovery in ("none", "least_squares", "refit"):
        pruned = copy.deepcopy(dense)
        list(apply_plan(pruned, plan, measured, recovery=recovery, damping=recipe.compensation_damping))
        reached[recovery] = quality(pruned, windows)
    assert quality(dense, windows) < reached["refit"] < reached["least_squares"] < reached["none"]
