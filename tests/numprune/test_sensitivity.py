import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from numprune.architectures import linear, prunable_groups
from numprune.sensitivity import LossProbe, rise_curve
from tests.numprune.conftest import CONFIGS, random_model


def divergence(model, changed, input_ids) -> float:
    """Nats per token from whole forward passes of both models."""
    with torch.no_grad():
        p, q = (m(input_ids).logits.double().log_softmax(-1) for m in (model, changed))
    return (p.exp() * (p - q)).sum().item() / input_ids.numel()


def without_columns(layer, count):
    weight = layer.weight.detach().clone()
    weight[:, :count] = 0
    return weight


def probe_at(model, input_ids, block, batch_size=5):
    probe = LossProbe(model, input_ids, batch_size=batch_size)
    for _ in range(block):
        probe.advance()
    return probe


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("count", [4, 16])
def test_rise_is_the_divergence_of_whole_models(model, input_ids, block, count):
    probe = probe_at(model, input_ids, block)
    for group in prunable_groups(model)[block]:
        layer = linear(model.model.layers[block], group.consumer)
        weight = without_columns(layer, count)
        changed = copy.deepcopy(model)
        with torch.no_grad():
            linear(changed.model.layers[block], group.consumer).weight.copy_(weight)
        expected = divergence(model, changed, input_ids)
        assert expected > 1e-3
        assert probe.rise(layer, weight) == pytest.approx(expected, rel=2e-3)


def test_other_layers_of_the_block_can_be_tried_too(llama, input_ids):
    layer = llama.model.layers[1].self_attn.q_proj
    weight = 0.5 * layer.weight.detach()
    changed = copy.deepcopy(llama)
    changed.model.layers[1].self_attn.q_proj.weight.data.copy_(weight)
    rise = probe_at(llama, input_ids, 1).rise(layer, weight)
    assert rise == pytest.approx(divergence(llama, changed, input_ids), rel=2e-3)


def test_its_own_weight_costs_nothing(model, input_ids):
    probe = probe_at(model, input_ids, 1)
    layer = model.model.layers[1].mlp.down_proj
    assert probe.rise(layer, layer.weight.detach().clone()) == pytest.approx(0, abs=1e-6)


def test_the_layer_keeps_its_weight(llama, input_ids):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    probe = probe_at(llama, input_ids, 1)
    layer = llama.model.layers[1].mlp.down_proj
    parameter, address = layer.weight, layer.weight.data_ptr()
    probe.rise(layer, torch.zeros_like(layer.weight))
    assert layer.weight is parameter
    assert layer.weight.data_ptr() == address
    assert layer.weight.requires_grad
    for name, tensor in llama.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_layer_keeps_its_weight_if_the_forward_pass_fails(llama, input_ids):
    probe = probe_at(llama, input_ids, 1)
    layer = llama.model.layers[1].mlp.down_proj
    before, address = layer.weight.detach().clone(), layer.weight.data_ptr()

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = llama.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        probe.rise(layer, torch.zeros_like(layer.weight))
    hook.remove()
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight, before)
    assert probe.rise(layer, before) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"])
def test_batch_size_does_not_matter(name, input_ids):
    model = random_model(CONFIGS[name])
    layer = model.model.layers[1].self_attn.o_proj
    weight = without_columns(layer, 16)
    rises = [probe_at(model, input_ids, 1, batch_size).rise(layer, weight) for batch_size in (1, 5, 12, 100)]
    assert rises == pytest.approx([rises[0]] * 4, rel=1e-5, abs=1e-5)


def test_weights_may_come_in_another_type(llama, input_ids):
    layer = llama.model.layers[0].mlp.down_proj
    weight = without_columns(layer, 10)
    probe = probe_at(llama, input_ids, 0)
    assert probe.rise(layer, weight.double()) == probe.rise(layer, weight)


# ---- The curve


CURVES = st.lists(st.floats(1e-4, 1.0), min_size=3, max_size=12)


@given(steps=CURVES, data=st.data())
def test_curve_is_exact_where_measured_and_never_falls(steps, data):
    losses = torch.tensor([0.0, *steps], dtype=torch.float64).cumsum(0)
    counts = data.draw(st.sets(st.integers(1, len(steps)), min_size=1, max_size=3))
    rise, measured = 0.0, {}
    for count in sorted(counts):
        rise += data.draw(st.floats(1e-3, 1.0))
        measured[count] = rise
    curve = rise_curve(losses, measured)
    assert curve.dtype == torch.float64
    assert curve.shape == losses.shape
    assert curve[0] == 0
    assert (curve.diff() >= 0).all()
    # Where the interpolated curve would fall it stays level, which can lift it above what was measured further on.
    factors = [measured[count] / losses[count].item() for count in sorted(counts)]
    if factors == sorted(factors):
        assert [curve[count].item() for count in measured] == pytest.approx(list(measured.values()))
    first = min(counts)
    torch.testing.assert_close(curve[: first + 1], losses[: first + 1] * factors[0])


def test_the_factor_is_interpolated_between_counts_and_constant_outside():
    losses = torch.tensor([0.0, 1, 2, 3, 4, 5, 6], dtype=torch.float64)
    curve = rise_curve(losses, {4: 16.0, 2: 4.0})  # Factors 2 and 4.
    assert curve.tolist() == pytest.approx([0, 1 * 2, 2 * 2, 3 * 3, 4 * 4, 5 * 4, 6 * 4])
    assert rise_curve(losses, {3: 6.0}).tolist() == pytest.approx([0, 2, 4, 6, 8, 10, 12])


def test_a_curve_that_would_fall_stays_level():
    losses = torch.tensor([0.0, 1, 2, 3], dtype=torch.float64)
    assert rise_curve(losses, {1: 6.0, 3: 3.0}).tolist() == pytest.approx([0, 6, 7, 7])


def test_rounding_below_zero_counts_as_none():
    losses = torch.tensor([0.0, 1, 2], dtype=torch.float64)
    assert rise_curve(losses, {1: -1e-9}).tolist() == [0, 0, 0]
    assert torch.isfinite(rise_curve(torch.zeros(3, dtype=torch.float64), {1: 1.0})).all()
