import copy

import pytest
import torch

from numprune.architectures import linear, prunable_groups
from numprune.capture import capture
from numprune.slicing import channel_indices, slice_block


@pytest.fixture
def kept(model):
    """A few units of every group, other numbers in every block."""
    generator = torch.Generator().manual_seed(0)
    chosen = {}
    for groups in prunable_groups(model):
        for group in groups:
            count = 1 + (3 * group.block + 2) % (group.units - 1)
            chosen[group.name] = torch.randperm(group.units, generator=generator)[:count].sort().values
    return chosen


def sliced(model, kept, statistics=None):
    result = copy.deepcopy(model)
    for block, groups in zip(result.model.layers, prunable_groups(model), strict=True):
        moments = statistics[groups[0].block].moments if statistics else None
        slice_block(block, groups, kept, moments, damping=1e-3)
    return result


@torch.no_grad()
def zeroed(model, kept, smaller):
    """The dense model with the pruned units' consumer columns at zero and the kept columns those of `smaller`."""
    result = copy.deepcopy(model)
    for block, cut, groups in zip(result.model.layers, smaller.model.layers, prunable_groups(model), strict=True):
        for group in groups:
            weight = linear(block, group.consumer).weight
            weight.zero_()
            weight[:, channel_indices(kept[group.name], group.channels)] = linear(cut, group.consumer).weight
    return result


@pytest.mark.parametrize("compensated", [False, True])
def test_sliced_equals_zeroed(model, kept, input_ids, compensated):
    statistics = list(capture(model, input_ids)) if compensated else None
    smaller = sliced(model, kept, statistics)
    with torch.no_grad():
        expected = zeroed(model, kept, smaller)(input_ids).logits
        torch.testing.assert_close(smaller(input_ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - model(input_ids).logits).norm() > 0.01 * expected.norm()


def test_tensors_shrink_to_the_kept_units(model, kept):
    smaller = sliced(model, kept)
    expected = sum(len(kept[g.name]) * g.unit_parameters for groups in prunable_groups(model) for g in groups)
    assert sum(g.parameters for groups in prunable_groups(smaller) for g in groups) == expected
    removed = sum(g.parameters for groups in prunable_groups(model) for g in groups) - expected
    assert model.num_parameters() - smaller.num_parameters() == removed
    assert all(p.is_contiguous() for p in smaller.parameters())


def test_generation_is_the_same_with_and_without_a_smaller_cache(model, kept, input_ids):
    smaller = sliced(model, kept)
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    cached = smaller.generate(input_ids[:3], **settings)
    assert torch.equal(cached, smaller.generate(input_ids[:3], use_cache=False, **settings))
    with torch.no_grad():
        cache = smaller(input_ids, use_cache=True).past_key_values
    heads = [layer.keys.shape[1] for layer in cache.layers]
    assert heads == [len(kept[f"{block}.attention"]) for block in range(len(heads))]


def test_compensation_brings_the_output_nearer(llama, input_ids):
    """Cut in half, the block's output on the calibration tokens is nearer to the dense one's with compensation."""
    group = prunable_groups(llama)[0][1]
    kept = {g.name: torch.arange(g.units) for g in prunable_groups(llama)[0]} | {group.name: torch.arange(20)}
    statistics = next(capture(llama, input_ids))
    errors = []
    for moments in (None, statistics.moments):
        block = copy.deepcopy(llama.model.layers[0])
        slice_block(block, prunable_groups(llama)[0], kept, moments)
        change = torch.zeros_like(linear(llama.model.layers[0], group.consumer).weight)
        change[:, :20] = linear(block, group.consumer).weight
        change -= linear(llama.model.layers[0], group.consumer).weight
        gram = statistics.moments[group.name].gram
        errors.append((change @ gram @ change.T).trace().item())
    assert errors[1] < errors[0]
