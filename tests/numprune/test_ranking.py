import copy
from typing import get_args

import pytest
import torch

from numprune.architectures import KINDS, PrunableGroup
from numprune.baselines import baseline_score, standardised
from numprune.box import box_score
from numprune.errors import NumpruneError
from numprune.newton import numerical_score
from numprune.obs import loss_curve, removal_order
from numprune.ranking import Ranking, Selection, load_rankings, rank, save_rankings
from numprune.statistics import Moments

OPTIONS = {"ratio": 0.3, "penalty": float("inf"), "damping": 1e-3}
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(80, 12, generator=GENERATOR) @ torch.randn(12, 12, generator=GENERATOR) + 0.5
WEIGHT = torch.randn(5, 12, generator=GENERATOR)
MOMENTS = Moments(X.T @ X, X.mean(0), len(X))


def group_of(units: int, channels: int, kind: str = "attention", block: int = 0) -> PrunableGroup:
    return PrunableGroup(block, kind, "consumer", (), units, channels, width=1, unit_parameters=1)


def unit_means(scores: torch.Tensor, channels: int) -> list[float]:
    """By a plain loop."""
    return [sum(scores[i : i + channels].tolist()) / channels for i in range(0, len(scores), channels)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("penalty", [float("inf"), 0.01])
def test_newton_takes_the_mask_at_ratio_1_of_unit_scale(channels, penalty):
    ranking = rank(
        group_of(12 // channels, channels), MOMENTS, WEIGHT, selection="newton", **OPTIONS | {"penalty": penalty}
    )
    gram = MOMENTS.gram.double() / MOMENTS.gram.double().trace()
    at_half = numerical_score(gram, WEIGHT, 0.5, penalty, damping=1e-3)
    expected = unit_means(1 - 2 * (1 - at_half), channels)
    torch.testing.assert_close(ranking.scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert ranking.order.tolist() == sorted(range(len(expected)), key=expected.__getitem__)
    assert ranking.losses is None
    assert ranking.rises is None


@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_box_takes_the_mask_at_the_ratio(ratio):
    ranking = rank(group_of(4, 3), MOMENTS, WEIGHT, selection="box", **OPTIONS | {"ratio": ratio})
    mask = box_score(MOMENTS.gram / MOMENTS.gram.trace(), WEIGHT, ratio, damping=1e-3)
    torch.testing.assert_close(
        ranking.scores, torch.tensor(unit_means(mask, 3), dtype=torch.float64), rtol=1e-5, atol=1e-6
    )
    assert ranking.scores.sum().item() == pytest.approx((1 - ratio) * 4, rel=1e-6)
    assert torch.equal(ranking.order, ranking.scores.argsort(stable=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_obs_scores_are_what_is_lost_when_the_unit_goes(channels):
    ranking = rank(group_of(12 // channels, channels), MOMENTS, WEIGHT, selection="obs", **OPTIONS)
    gram = MOMENTS.gram.double()
    assert torch.equal(ranking.order, removal_order(gram, WEIGHT, channels=channels, damping=1e-3))
    losses = loss_curve(gram, WEIGHT, ranking.order, channels=channels, damping=1e-3)
    assert torch.equal(ranking.losses, losses)
    for position, unit in enumerate(ranking.order.tolist()):
        assert ranking.scores[unit] == losses[position + 1]
    assert torch.equal(ranking.scores.argsort(), ranking.order)


def test_obs_on_many_units_removes_several_at_once():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(600, 300, generator=generator), torch.randn(4, 300, generator=generator)
    moments = Moments(x.T @ x, x.mean(0), len(x))
    ranking = rank(group_of(300, 1), moments, weight, selection="obs", **OPTIONS)
    assert sorted(ranking.order.tolist()) == list(range(300))
    assert torch.equal(ranking.order, removal_order(moments.gram.double(), weight, damping=1e-3, at_once=2))
    assert torch.equal(ranking.scores[ranking.order], ranking.scores.sort().values)


@pytest.mark.parametrize("selection", ["magnitude", "wanda_sp"])
def test_baselines_are_means_over_channels(selection):
    ranking = rank(group_of(4, 3), MOMENTS, WEIGHT, selection=selection, **OPTIONS)
    expected = unit_means(baseline_score(selection, MOMENTS, WEIGHT), 3)
    torch.testing.assert_close(ranking.scores, torch.tensor(expected, dtype=torch.float64))
    assert ranking.order.tolist() == sorted(range(4), key=expected.__getitem__)


def test_flap_is_standardised_over_the_layer():
    ranking = rank(group_of(12, 1), MOMENTS, WEIGHT, selection="flap", **OPTIONS)
    assert ranking.scores.mean().item() == pytest.approx(0, abs=1e-12)
    assert ranking.scores.std(correction=0).item() == pytest.approx(1)
    variance = X.double().var(0, correction=0)
    plain = variance * WEIGHT.double().square().sum(0)
    torch.testing.assert_close(ranking.scores, (plain - plain.mean()) / plain.std(correction=0), rtol=1e-4, atol=1e-4)
    heads = rank(group_of(4, 3), MOMENTS, WEIGHT, selection="flap", **OPTIONS)
    expected = unit_means(standardised(baseline_score("flap", MOMENTS, WEIGHT)), 3)
    torch.testing.assert_close(heads.scores, torch.tensor(expected, dtype=torch.float64))


def test_random_follows_the_seed_and_the_group_alone():
    def scores(seed, **options):
        group = group_of(12, 1, **options)
        return rank(group, MOMENTS, WEIGHT, selection="random", seed=seed, **OPTIONS).scores.tolist()

    draws = [scores(seed, block=block, kind=kind) for seed in (0, 1) for block in (0, 1) for kind in KINDS]
    assert len({tuple(draw) for draw in draws}) == 8
    torch.rand(5)  # The global generator does not take part, nor do draws in between.
    assert scores(1, block=0, kind="mlp") == draws[5]
    assert scores(0) == draws[0]


@pytest.mark.parametrize("selection", get_args(Selection))
def test_losses_on_request(selection):
    group = group_of(4, 3)
    ranking = rank(group, MOMENTS, WEIGHT, selection=selection, with_losses=True, **OPTIONS)
    expected = loss_curve(MOMENTS.gram, WEIGHT, ranking.order, channels=3, damping=1e-3)
    torch.testing.assert_close(ranking.losses, expected)
    plain = rank(group, MOMENTS, WEIGHT, selection=selection, **OPTIONS)
    assert torch.equal(plain.order, ranking.order)
    assert torch.equal(plain.scores, ranking.scores)


@pytest.mark.parametrize("selection", get_args(Selection))
def test_ranking_leaves_its_arguments_and_takes_half_precision(selection):
    moments, weight = copy.deepcopy(MOMENTS), WEIGHT.bfloat16()
    ranking = rank(group_of(4, 3), moments, weight, selection=selection, with_losses=True, **OPTIONS)
    assert torch.equal(moments.gram, MOMENTS.gram)
    assert torch.equal(weight, WEIGHT.bfloat16())
    assert ranking.scores.dtype == ranking.losses.dtype == torch.float64
    assert sorted(ranking.order.tolist()) == [0, 1, 2, 3]


def test_unknown_selections_are_refused():
    with pytest.raises(ValueError, match="got 'best'"):
        rank(group_of(4, 3), MOMENTS, WEIGHT, selection="best", **OPTIONS)


def test_a_file_brings_rankings_back(tmp_path):
    rankings = {
        f"0.{selection}": rank(group_of(4, 3), MOMENTS, WEIGHT, selection=selection, with_losses=with_losses, **OPTIONS)
        for selection, with_losses in [("newton", False), ("box", True), ("obs", True), ("random", False)]
    }
    losses = rankings["0.obs"].losses
    rankings["12.mlp"] = Ranking(torch.rand(3), torch.tensor([2, 0, 1]), rises=losses.clone())
    save_rankings(rankings, tmp_path / "rankings.safetensors")
    loaded = load_rankings(tmp_path / "rankings.safetensors")
    assert loaded.keys() == rankings.keys()
    for name, ranking in rankings.items():
        for part in ("scores", "order", "losses", "rises"):
            wanted, found = getattr(ranking, part), getattr(loaded[name], part)
            assert (wanted is None) == (found is None)
            if wanted is not None:
                assert wanted.dtype == found.dtype
                assert torch.equal(wanted, found)
    assert [path.name for path in tmp_path.iterdir()] == ["rankings.safetensors"]


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "rankings.safetensors"
    save_rankings({"0.mlp": Ranking(torch.ones(3), torch.arange(3))}, path)
    assert load_rankings(path).keys() == {"0.mlp"}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(NumpruneError, match=r"rankings\.safetensors is truncated or damaged"):
        load_rankings(path)
