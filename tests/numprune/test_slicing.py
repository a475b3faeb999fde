import copy

import pytest
import torch

from numprune.architectures import linear, prunable_groups
from numprune.capture import capture
from numprune.slicing import add_bias, slice_block


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


def sliced(model, kept, statistics=None, compensation="none"):
    result = copy.deepcopy(model)
    for index, (block, groups) in enumerate(zip(result.model.layers, prunable_groups(model), strict=True)):
        moments = statistics[index].moments if statistics else None
        slice_block(block, groups, kept, compensation=compensation, moments=moments, damping=1e-3)
    return result


@torch.no_grad()
def zeroed(model, kept, smaller):
    """The dense model with the pruned units' consumer columns at zero and the kept columns those of `smaller`."""
    result = copy.deepcopy(model)
    for block, cut, groups in zip(result.model.layers, smaller.model.layers, prunable_groups(model), strict=True):
        for group in groups:
            layer = linear(block, group.consumer)
            layer.weight.zero_()
            if not len(kept[group.name]):
                layer.bias = None
                continue
            layer.weight[:, group.columns(kept[group.name])] = linear(cut, group.consumer).weight
            layer.bias = linear(cut, group.consumer).bias
    return result


@pytest.fixture
def kept_depth(kept):
    """The first block's attention, the second block's MLP and all of the third are gone."""
    gone = torch.tensor([], dtype=torch.long)
    return kept | {"0.attention": gone, "1.mlp": gone, "2.attention": gone, "2.mlp": gone}


@pytest.mark.parametrize("compensation", ["none", "bias", "least_squares"])
def test_sliced_equals_zeroed(model, kept, input_ids, compensation):
    smaller = sliced(model, kept, list(capture(model, input_ids)), compensation)
    with torch.no_grad():
        expected = zeroed(model, kept, smaller)(input_ids).logits
        torch.testing.assert_close(smaller(input_ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - model(input_ids).logits).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("compensation", ["none", "bias", "least_squares"])
def test_absent_modules_add_nothing(model, kept_depth, input_ids, compensation):
    smaller = sliced(model, kept_depth, list(capture(model, input_ids)), compensation)
    with torch.no_grad():
        expected = zeroed(model, kept_depth, smaller)(input_ids).logits
        torch.testing.assert_close(smaller(input_ids).logits, expected, rtol=1e-4, atol=1e-4)
    names = "\n".join(smaller.state_dict())
    for path in ("layers.0.self_attn", "layers.1.mlp", "layers.2.self_attn", "layers.2.mlp"):
        assert path not in names
    assert all(parameter.numel() for parameter in smaller.parameters())


def test_generation_with_a_cache_knows_positions_without_the_first_attention(model, kept_depth, input_ids):
    smaller = sliced(model, kept_depth)
    mask = torch.ones_like(input_ids[:3])
    mask[0, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    expected = smaller.generate(input_ids[:3], use_cache=False, do_sample=False, **settings)
    assert torch.equal(smaller.generate(input_ids[:3], **settings), expected)
    beams = smaller.generate(input_ids[:3], num_beams=2, **settings)
    assert torch.equal(beams, smaller.generate(input_ids[:3], num_beams=2, use_cache=False, **settings))


def test_a_bias_gives_what_the_pruned_inputs_give_on_average(llama, input_ids):
    """On the calibration tokens the mean output stays, and the kept weights are as they were."""
    groups = prunable_groups(llama)[0]
    kept = {group.name: torch.arange(group.units // 2) for group in groups}
    moments = next(capture(llama, input_ids)).moments
    block = copy.deepcopy(llama.model.layers[0])
    slice_block(block, groups, kept, compensation="bias", moments=moments)
    for group in groups:
        dense, cut = linear(llama.model.layers[0], group.consumer), linear(block, group.consumer)
        columns = group.columns(kept[group.name])
        assert torch.equal(cut.weight, dense.weight[:, columns])
        mean = moments[group.name].mean
        torch.testing.assert_close(cut(mean[columns]), dense(mean), rtol=1e-4, atol=1e-5)


def test_a_bias_is_added_to_one_that_is_there():
    layer = torch.nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    for expected in (1.0, 2.0):
        add_bias(layer, torch.ones(2))
        assert layer.bias.dtype == torch.bfloat16
        assert layer.bias.tolist() == [expected, expected]
    assert layer.bias.requires_grad


@pytest.mark.parametrize("compensation", ["bias", "least_squares"])
def test_compensation_needs_moments(llama, compensation):
    groups = prunable_groups(llama)[0]
    kept = {group.name: torch.arange(group.units) for group in groups}
    with pytest.raises(ValueError, match=f"'{compensation}' needs moments"):
        slice_block(llama.model.layers[0], groups, kept, compensation=compensation)


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
    for compensation in ("none", "least_squares"):
        block = copy.deepcopy(llama.model.layers[0])
        groups = prunable_groups(llama)[0]
        slice_block(block, groups, kept, compensation=compensation, moments=statistics.moments)
        change = torch.zeros_like(linear(llama.model.layers[0], group.consumer).weight)
        change[:, :20] = linear(block, group.consumer).weight
        change -= linear(llama.model.layers[0], group.consumer).weight
        gram = statistics.moments[group.name].gram
        errors.append((change @ gram @ change.T).trace().item())
    assert errors[1] < errors[0]
