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


def rises(model, input_ids, trials, batch_size=5, first=0):
    """Rises by name of trials (block, layer, weight), measured in one pass."""
    device = torch.device("cpu")
    probe = LossProbe(model, input_ids, batch_size=batch_size, device=device, first=first)
    for index, block in enumerate(model.model.layers[first:], first):
        probe.follow(index, block)
        for name, (at, layer, weight) in trials.items():
            if at == index:
                probe.branch(name, index, block, layer, weight)
        probe.advance(index, block)
    return probe.rises()


@pytest.mark.parametrize("count", [4, 16])
def test_rises_are_the_divergences_of_whole_models(model, input_ids, count):
    trials, expected = {}, {}
    for index, groups in enumerate(prunable_groups(model)):
        for group in groups:
            layer = linear(model.model.layers[index], group.consumer)
            weight = without_columns(layer, count)
            changed = copy.deepcopy(model)
            with torch.no_grad():
                linear(changed.model.layers[index], group.consumer).weight.copy_(weight)
            trials[group.name] = index, layer, weight
            expected[group.name] = divergence(model, changed, input_ids)
    assert min(expected.values()) > 1e-3
    assert rises(model, input_ids, trials) == pytest.approx(expected, rel=2e-3)


def test_trials_may_begin_later(llama, input_ids):
    layer = llama.model.layers[1].self_attn.q_proj
    trials = {"half": (1, layer, 0.5 * layer.weight.detach())}
    assert rises(llama, input_ids, trials, first=1) == rises(llama, input_ids, trials)


def test_its_own_weight_costs_nothing(model, input_ids):
    layer = model.model.layers[1].mlp.down_proj
    trials = {"same": (1, layer, layer.weight.detach().clone())}
    assert rises(model, input_ids, trials)["same"] == pytest.approx(0, abs=1e-6)


def test_the_layer_keeps_its_weight_also_if_the_forward_pass_fails(llama, input_ids):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    layer = llama.model.layers[1].mlp.down_proj
    parameter, address = layer.weight, layer.weight.data_ptr()
    trials = {"nothing": (1, layer, torch.zeros_like(layer.weight))}
    rises(llama, input_ids, trials)

    def fail(*_):
        if not layer.weight.any():
            raise RuntimeError("something")

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="something"):
        rises(llama, input_ids, trials)
    hook.remove()
    assert layer.weight is parameter
    assert layer.weight.data_ptr() == address
    assert layer.weight.requires_grad
    for name, tensor in llama.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"])
def test_batch_size_does_not_matter(name, input_ids):
    model = random_model(CONFIGS[name])
    layer = model.model.layers[1].self_attn.o_proj
    trials = {"cut": (1, layer, without_columns(layer, 16))}
    found = [rises(model, input_ids, trials, batch_size)["cut"] for batch_size in (1, 5, 12, 100)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-5, abs=1e-5)


def test_weights_may_come_in_another_type(llama, input_ids):
    layer = llama.model.layers[0].mlp.down_proj
    weight = without_columns(layer, 10)
    found = rises(llama, input_ids, {"single": (0, layer, weight), "double": (0, layer, weight.double())})
    assert found["single"] == found["double"]


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
