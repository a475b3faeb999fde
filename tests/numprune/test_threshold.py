import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from numprune.architectures import PrunableGroup
from numprune.errors import NumpruneError
from numprune.threshold import select_units


def group(block: int, kind: str, units: int, parameters: int) -> PrunableGroup:
    return PrunableGroup(block, kind, "consumer", (), units, channels=1, unit_parameters=parameters)


def model_of(blocks: int, heads: int = 4, channels: int = 30) -> list[PrunableGroup]:
    return [g for i in range(blocks) for g in (group(i, "attention", heads, 16), group(i, "mlp", channels, 3))]


def random_scores(groups: list[PrunableGroup], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.randn(g.units, generator=generator, dtype=torch.float64) for g in groups}


@given(seed=st.integers(0, 2**31), blocks=st.integers(1, 5), ratio=st.floats(0.02, 0.8))
def test_walk_over_parameters_matches_a_plain_loop(seed, blocks, ratio):
    groups = model_of(blocks)
    scores = random_scores(groups, seed)
    total = sum(g.parameters for g in groups)
    best = {g.name: int(scores[g.name].argmax()) for g in groups}
    ranked = sorted(
        (scores[g.name][unit].item(), g.unit_parameters, g.name, unit)
        for g in groups
        for unit in range(g.units)
        if unit != best[g.name]
    )
    removed, gone = set(), 0
    for _, parameters, name, unit in ranked:
        if abs(gone + parameters - ratio * total) >= abs(gone - ratio * total):
            break
        gone += parameters
        removed.add((name, unit))
    kept = select_units(groups, scores, ratio).kept
    result = {(g.name, unit) for g in groups for unit in range(g.units)} - {
        (name, unit) for name, units in kept.items() for unit in units.tolist()
    }
    assert result == removed


@given(seed=st.integers(0, 2**31), ratio=st.floats(0.05, 0.8))
def test_share_is_met_to_half_a_unit_and_every_group_survives(seed, ratio):
    groups = model_of(4)
    selection = select_units(groups, random_scores(groups, seed), ratio)
    total = sum(g.parameters for g in groups)
    kept = sum(len(selection.kept[g.name]) * g.unit_parameters for g in groups)
    assert abs(total - kept - ratio * total) <= 16 / 2 + 1e-9  # Beyond the half unit only by rounding.
    assert all(len(units) for units in selection.kept.values())


def test_literal_reading_spares_attention_and_removes_less():
    groups = model_of(4)
    scores = {name: score.abs() for name, score in random_scores(groups, 0).items()}
    literal = select_units(groups, scores, 0.3, threshold="literal").kept
    total = sum(g.parameters for g in groups)
    gone = 1 - sum(len(literal[g.name]) * g.unit_parameters for g in groups) / total
    assert sum(g.units - len(literal[g.name]) for g in groups) == math.ceil(0.3 * sum(g.units for g in groups))
    weighted = torch.cat([scores[g.name] * g.unit_parameters / 3 for g in groups])
    expected = torch.cat([torch.isin(torch.arange(g.units), literal[g.name]) for g in groups])
    assert weighted[~expected].max() <= weighted[expected].min()
    assert gone < 0.3


def test_a_ratio_that_would_empty_layers_is_refused():
    groups = model_of(1, heads=2, channels=2)
    with pytest.raises(NumpruneError, match=r"ratio 0.9 cannot be reached.* at most 0.500"):
        select_units(groups, random_scores(groups, 0), 0.9)


@pytest.mark.parametrize("ratio", [0, 1, -1, math.nan])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\)"):
        select_units(model_of(1), {}, ratio)


def test_counts_of_a_large_model_are_exact():
    """With 10^11 parameters, float32 would not tell which side of the budget a channel is on."""
    groups = [group(0, "attention", 1000, 10**8 + 1), group(0, "mlp", 1001, 3)]
    scores = {"0.attention": torch.arange(1000.0), "0.mlp": 10**6 + torch.arange(1001.0)}
    total = sum(g.parameters for g in groups)
    kept = select_units(groups, scores, (999 * (10**8 + 1) + 3 * 200) / total).kept
    assert len(kept["0.attention"]) == 1
    assert len(kept["0.mlp"]) == 801
