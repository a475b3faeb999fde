import copy
from typing import get_args

import pytest
import torch

from numprune.architectures import linear, prunable_groups
from numprune.capture import capture
from numprune.compensation import compensate
from numprune.cutting import cut, twin
from numprune.pruning import capture_to
from numprune.recovery import Recovery
from numprune.slicing import slice_block
from numprune.statistics import Measured

RECOVERIES = get_args(Recovery)


@pytest.fixture
def measured(model, input_ids, tmp_path):
    list(capture_to(tmp_path, model, input_ids, batch_size=5))
    return Measured(tmp_path, input_ids, batch_size=5)


@pytest.fixture
def kept(model):
    """About two thirds of every group."""
    generator = torch.Generator().manual_seed(0)
    return {
        group.name: torch.randperm(group.units, generator=generator)[: 1 + 2 * group.units // 3].sort().values
        for groups in prunable_groups(model)
        for group in groups
    }


def cut_copy(model, kept, measured, **options):
    result = copy.deepcopy(model)
    assert list(cut(result, kept, measured, **options)) == list(range(len(model.model.layers)))
    return result


def sliced(model, kept):
    result = copy.deepcopy(model)
    for block, groups in zip(result.model.layers, prunable_groups(model), strict=True):
        slice_block(block, groups, kept)
    return result


def assert_same(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@torch.no_grad()
def last_hidden(model, input_ids):
    return model.model(input_ids).last_hidden_state.flatten(0, 1).double()


def test_a_twin_has_the_same_tensors_and_modules_of_its_own(model, input_ids):
    other = twin(model)
    parameters = dict(other.named_parameters(remove_duplicate=False))
    assert parameters.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    assert all(parameters[name] is p for name, p in model.named_parameters(remove_duplicate=False))
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}
    assert torch.equal(last_hidden(other, input_ids), last_hidden(model, input_ids))


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_cutting_a_twin_leaves_the_first_as_it_is(model, kept, measured, input_ids, recovery):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups, modules = prunable_groups(model), list(model.modules())
    hidden = last_hidden(model, input_ids)
    other = twin(model)
    list(cut(other, kept | {"1.mlp": torch.tensor([], dtype=torch.long)}, measured, recovery=recovery))
    assert_same(model, state)
    assert prunable_groups(model) == groups
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(last_hidden(model, input_ids), hidden)
    assert prunable_groups(other) != groups


def test_none_is_slicing_and_needs_nothing_measured(model, kept):
    assert_same(cut_copy(model, kept, None, recovery="none"), sliced(model, kept).state_dict())


@pytest.mark.parametrize("recovery", ["bias", "least_squares"])
def test_bias_and_least_squares_are_those_of_slicing(model, kept, measured, input_ids, recovery):
    pruned = cut_copy(model, kept, measured, recovery=recovery, damping=1e-3)
    for index, statistics in enumerate(capture(model, input_ids, batch_size=5)):
        block, groups = copy.deepcopy(model.model.layers[index]), prunable_groups(model)[index]
        slice_block(block, groups, kept, compensation=recovery, moments=statistics.moments, damping=1e-3)
        assert_same(pruned.model.layers[index], block.state_dict())


def test_automatic_damping_is_that_of_each_projections_moments(model, kept, measured):
    pruned = cut_copy(model, kept, measured, recovery="least_squares", damping="auto")
    for index, groups in enumerate(prunable_groups(model)):
        for group in groups:
            moments = measured.block(index).moments[group.name]
            columns = group.columns(kept[group.name])
            weight = linear(model.model.layers[index], group.consumer).weight
            expected = compensate(moments.gram, weight, columns, moments.damping("auto"))
            assert moments.damping("auto") > 1e-4
            assert torch.equal(linear(pruned.model.layers[index], group.consumer).weight, expected)


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_what_is_not_prunable_stays(model, kept, measured, recovery):
    pruned = cut_copy(model, kept, measured, recovery=recovery).state_dict()
    touched = ("self_attn", "mlp", *(["model.norm"] if recovery == "refit" else []))
    for name, tensor in model.state_dict().items():
        if not any(part in name for part in touched):
            assert torch.equal(pruned[name], tensor), name


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_cutting_nothing_changes_next_to_nothing(model, measured, input_ids, recovery):
    everything = {g.name: torch.arange(g.units) for groups in prunable_groups(model) for g in groups}
    pruned = cut_copy(model, everything, measured, recovery=recovery)
    found, wanted = last_hidden(pruned, input_ids), last_hidden(model, input_ids)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("recovery", [r for r in RECOVERIES if r != "none"])
def test_recovery_needs_what_was_measured(llama, recovery):
    with pytest.raises(ValueError, match=f"recovery '{recovery}' needs measured, got None"):
        next(cut(llama, {}, None, recovery=recovery))


def test_the_last_norm_is_the_best_factor_of_every_channel(model, kept, measured, input_ids):
    """Against least squares, channel by channel, from the hidden states that the dense model's norm gives."""
    pruned = cut_copy(model, kept, measured, recovery="refit")
    own, refitted = model.model.norm.weight.detach(), pruned.model.norm.weight.detach().clone()
    pruned.model.norm.weight.data = own.clone()
    found, wanted = last_hidden(pruned, input_ids), last_hidden(model, input_ids)
    factors = [
        torch.linalg.lstsq(found[:, c : c + 1], wanted[:, c : c + 1]).solution.item() for c in range(found.shape[1])
    ]
    torch.testing.assert_close(refitted, own * torch.tensor(factors), rtol=1e-4, atol=1e-5)
    assert (refitted - own).abs().max() > 1e-3
    before = (found - wanted).square().sum()
    pruned.model.norm.weight.data = refitted
    assert (last_hidden(pruned, input_ids) - wanted).square().sum() < before


def test_refit_comes_nearer_than_sequential(model, kept, measured, input_ids):
    wanted = last_hidden(model, input_ids)
    errors = [
        (last_hidden(cut_copy(model, kept, measured, recovery=recovery), input_ids) - wanted).norm().item()
        for recovery in ("refit", "sequential")
    ]
    assert errors[0] < errors[1]


def test_batch_size_does_not_matter(llama, input_ids, tmp_path):
    list(capture_to(tmp_path, llama, input_ids, batch_size=5))
    kept = {g.name: torch.arange(0, g.units, 2) for groups in prunable_groups(llama) for g in groups}
    one, other = (
        cut_copy(llama, kept, Measured(tmp_path, input_ids, batch_size=size), recovery="refit") for size in (1, 7)
    )
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
