import pytest
import torch

from numprune.architectures import linear, prunable_groups
from numprune.capture import capture
from numprune.errors import NumpruneError
from numprune.slicing import slice_block
from numprune.statistics import BlockStatistics


def whole_model_inputs(model, input_ids):
    """What enters every consumer in one ordinary forward pass, in double precision."""
    seen = {}
    for block, groups in zip(model.model.layers, prunable_groups(model), strict=True):
        for group in groups:

            def keep(_module, inputs, name=group.name):
                seen[name] = inputs[0].flatten(0, -2).double()

            linear(block, group.consumer).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(input_ids)
    return seen


def test_block_by_block_equals_one_forward_pass(model, input_ids):
    statistics = list(capture(model, input_ids, batch_size=5))
    assert [s.block for s in statistics] == [0, 1, 2]
    for name, rows in whole_model_inputs(model, input_ids).items():
        moments = statistics[int(name.split(".")[0])].moments[name]
        gram = rows.T @ rows
        assert (moments.gram - gram).norm() < 1e-5 * gram.norm()
        torch.testing.assert_close(moments.mean.double(), rows.mean(0), rtol=1e-4, atol=1e-5)
        assert moments.count == input_ids.numel()


def test_model_in_double_precision_is_measured_in_it(model, input_ids):
    statistics = list(capture(model.double(), input_ids, batch_size=5))
    for name, rows in whole_model_inputs(model, input_ids).items():
        moments = statistics[int(name.split(".")[0])].moments[name]
        torch.testing.assert_close(moments.gram, rows.T @ rows, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-12, atol=1e-12)


def test_batch_size_does_not_matter(llama, input_ids):
    one = list(capture(llama, input_ids, batch_size=1))
    all_at_once = list(capture(llama, input_ids, batch_size=100))
    for left, right in zip(one, all_at_once, strict=True):
        for name, moments in left.moments.items():
            torch.testing.assert_close(moments.gram, right.moments[name].gram, rtol=1e-4, atol=1e-3)


def test_model_is_left_as_it_was(llama, input_ids):
    before = llama(input_ids).logits
    state = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    list(capture(llama, input_ids))
    assert all(torch.equal(tensor, state[name]) for name, tensor in llama.state_dict().items())
    assert torch.equal(llama(input_ids).logits, before)
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_nothing_is_computed_before_it_is_asked_for(llama, input_ids):
    """A caller that stops early pays for the blocks it took, no more."""
    ran = []
    for index, block in enumerate(llama.model.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    next(capture(llama, input_ids, batch_size=6))
    assert ran == [0, 0]


def test_blocks_without_groups_are_passed(llama, input_ids, tmp_path):
    groups = prunable_groups(llama)[1]
    nothing = torch.tensor([], dtype=torch.long)
    slice_block(llama.model.layers[1], groups, {group.name: nothing for group in groups})
    statistics = list(capture(llama, input_ids))
    assert [len(s.moments) for s in statistics] == [2, 0, 2]
    statistics[1].save(tmp_path)
    assert BlockStatistics.load(tmp_path, 1) == statistics[1]


def test_overflow_names_the_block(llama, input_ids):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.fill_(1e38)
    with pytest.raises(NumpruneError, match="NaN or infinite after decoder block 1"):
        list(capture(llama, input_ids))


def test_statistics_survive_a_file(llama, input_ids, tmp_path):
    statistics = next(capture(llama, input_ids))
    statistics.save(tmp_path)
    loaded = BlockStatistics.load(tmp_path, 0)
    assert loaded.moments.keys() == statistics.moments.keys()
    for name, moments in statistics.moments.items():
        assert torch.equal(loaded.moments[name].gram, moments.gram)
        assert torch.equal(loaded.moments[name].mean, moments.mean)
        assert loaded.moments[name].count == moments.count
