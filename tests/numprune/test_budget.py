import copy
import string
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

from numprune.architectures import decoder_blocks, prunable_groups
from numprune.budget import Budget, Costs, linear_costs, parse_budget, readable, to_remove
from numprune.checkpoint import load_model, load_shapes, weight_bytes
from numprune.errors import NumpruneError
from numprune.saving import save_pruned
from numprune.slicing import slice_block
from tests.numprune.conftest import CONFIGS

LENGTH = 24
BATCH = 3


def units(model):
    return {group.name: group.units for groups in prunable_groups(model) for group in groups}


def cut(model):
    """Slices a model in place, every group to another share, and returns how many units are kept."""
    kept = {name: 1 + (7 * index + 1) % count for index, (name, count) in enumerate(units(model).items())}
    for block, groups in zip(decoder_blocks(model), prunable_groups(model), strict=True):
        slice_block(block, groups, {group.name: torch.arange(kept[group.name]) for group in groups})
    return kept


def budget(kind):
    return Budget(kind, 0.5, batch=BATCH, length=LENGTH)


def assert_just_enough(predicted, folder, model):
    """Counted bytes are never below those of the files, and above them by a few digits a tensor at most."""
    spare = predicted - weight_bytes(folder)
    assert 0 <= spare <= 64 + 16 * len(list(model.named_parameters()))


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("0.2", "ratio", 0.2),
        ("parameters-4M", "parameters", 4e6),
        ("parameters-1234567", "parameters", 1234567),
        ("size-8MB", "size", 8e6),
        ("size-8MiB", "size", 8 * 2**20),
        ("size-512B", "size", 512),
        ("memory-1.5GiB", "memory", 1.5 * 2**30),
        ("memory-2GB", "memory", 2e9),
        ("flops-6.25G", "flops", 6.25e9),
        ("flops-1T", "flops", 1e12),
        ("latency-5ms", "latency", 0.005),
        ("latency-750us", "latency", 0.00075),
        ("latency-2s", "latency", 2),
    ],
)
def test_text_is_read_and_written_back(text, kind, value):
    parsed = parse_budget(text, batch=BATCH, length=LENGTH)
    assert parsed == Budget(kind, value, BATCH, LENGTH)
    assert parse_budget(str(parsed), batch=BATCH, length=LENGTH) == parsed


@pytest.mark.parametrize("text", ["0.2", "parameters-4M", "size-8.5MB", "memory-2GB", "flops-6G", "latency-5ms"])
def test_canonical_text_is_written_as_it_was(text):
    assert str(parse_budget(text)) == text


@given(
    kind=st.sampled_from(["parameters", "size", "memory", "flops", "latency"]),
    value=st.floats(1e-9, 1e18),
    ratio=st.floats(1e-9, 0.999999999),
)
def test_every_budget_comes_back_from_its_text(kind, value, ratio):
    for original in (Budget(kind, value), Budget("ratio", ratio)):
        assert parse_budget(str(original)) == original
        assert set(str(original)) <= set(string.ascii_letters + string.digits + ".-")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no budget"),
        ("a fifth", "no budget"),
        ("ratio-0.2", "no budget"),
        ("energy-5J", "no budget"),
        ("size8MB", "no budget"),
        ("size--8MB", "no budget"),
        ("0.2\n", "no budget"),
        ("1.2", r"ratio must be in \(0, 1\), got 1.2"),
        ("0", r"ratio must be in \(0, 1\)"),
        ("size-0MB", r"size must be in \(0, inf\)"),
        ("size-8", "unit 'none'; size takes B, kB"),
        ("latency-5", "latency takes us, ms, s"),
        ("parameters-4MB", "unit 'MB'; parameters takes no unit, k, M"),
        ("0.2M", "ratio takes no unit"),
    ],
)
def test_text_that_is_no_budget(text, message):
    with pytest.raises(NumpruneError, match=message):
        parse_budget(text)


def test_values_out_of_range():
    with pytest.raises(NumpruneError, match="got batch 0 and length 8"):
        Budget("memory", 1e6, batch=0, length=8)
    with pytest.raises(NumpruneError, match="got nan"):
        Budget("size", float("nan"))
    with pytest.raises(ValueError, match="kind must be one of ratio, parameters"):
        Budget("energy", 1.0)


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (8_700_000, "size", "8.7 MB"),
        (4_334_000, "parameters", "4.33 M"),
        (0.0051, "latency", "5.1 ms"),
        (999_999, "flops", "1 M"),
        (950, "parameters", "950"),
        (0, "memory", "0 B"),
        (0.25, "ratio", "0.25"),
        (5e15, "flops", "5000 T"),
        (2e-7, "latency", "0.2 us"),
    ],
)
def test_costs_are_readable(value, kind, text):
    assert readable(value, kind) == text


def test_total_is_linear_in_the_kept_units():
    assert Costs(10, {"0.attention": 3, "0.mlp": 0.5}).total({"0.attention": 2, "0.mlp": 4}) == 18


def test_ratio_and_parameters_are_those_of_the_sliced_model(model):
    dense = copy.deepcopy(model)
    kept = cut(model)
    assert linear_costs(dense, budget("parameters")).total(kept) == sum(p.numel() for p in model.parameters())
    removed = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in model.parameters())
    ratio = linear_costs(dense, budget("ratio"))
    assert ratio.fixed == 0
    assert ratio.total(units(dense)) - ratio.total(kept) == removed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_size_is_that_of_the_files(make_checkpoint, tmp_path, input_ids, name, dtype):
    config = CONFIGS[name].__class__(**CONFIGS[name].to_dict() | {"dtype": dtype})
    dense = make_checkpoint(config)
    shapes = load_shapes(dense)
    costs = linear_costs(shapes, budget("size"))
    assert_just_enough(costs.total(units(shapes)), dense, shapes)
    model = load_model(dense, dtype=torch.float32)  # Pruned in float32, saved as the source.
    kept = cut(model)
    save_pruned(model, dense, tmp_path / "pruned", SimpleNamespace(save=Path.touch), input_ids)
    assert_just_enough(costs.total(kept), tmp_path / "pruned", shapes)
    again = load_shapes(tmp_path / "pruned")  # A pruned model has costs of its own: pruning can go on.
    assert_just_enough(linear_costs(again, budget("size")).total(units(again)), tmp_path / "pruned", again)


@torch.no_grad()
def test_memory_is_that_of_weights_and_cache(model, input_ids):
    costs = linear_costs(model, budget("memory"))
    kept = cut(model)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    model(input_ids[:BATCH, :LENGTH], past_key_values=cache)
    tensors = [*model.parameters(), *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))]
    assert costs.total(kept) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def test_flops_are_those_of_one_decoding_step(model, input_ids):
    costs = linear_costs(model, budget("flops"))
    model.set_attn_implementation("eager")
    for prepare in (units, cut):
        kept = prepare(model)
        cache = model(input_ids[:1, : LENGTH - 1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids[:1, LENGTH - 1 : LENGTH], past_key_values=cache)
        assert costs.total(kept) == counter.get_total_flops()


def test_what_must_go_leads_to_the_budget(llama):
    dense = units(llama)
    _, amount = to_remove(llama, Budget("ratio", 0.25))
    assert amount == 0.25 * sum(group.parameters for groups in prunable_groups(llama) for group in groups)
    for kind in ("parameters", "size", "memory", "flops"):
        total = linear_costs(llama, Budget(kind, 1.0)).total(dense)
        costs, amount = to_remove(llama, Budget(kind, 0.7 * total))
        assert costs.total(dense) - amount == pytest.approx(0.7 * total)


def test_budget_above_the_dense_model(llama):
    with pytest.raises(NumpruneError, match=r"met without pruning: the dense model comes to 40.2 k, 9.84 k below"):
        to_remove(llama, parse_budget("parameters-50k"))


def test_budget_below_the_smallest_model(llama):
    least = linear_costs(llama, parse_budget("parameters-1k")).total(dict.fromkeys(units(llama), 1))
    with pytest.raises(NumpruneError, match=r"with 1 unit kept in every group the least possible is 22\.1 k") as error:
        to_remove(llama, parse_budget("parameters-1k"))
    to_remove(llama, parse_budget("parameters-22.1k"))  # The limit that the message names can be met.
    assert least < 22_100
    assert str(error.value).startswith("parameters-1k cannot be met")
    with pytest.raises(NumpruneError, match="with 4 units kept"):
        to_remove(llama, parse_budget("parameters-22.1k"), minimum=4)


def test_ratio_beyond_the_smallest_model(llama):
    with pytest.raises(NumpruneError, match=r"ratio 0.99 cannot be reached: .* at most (0\.\d+) can go") as error:
        to_remove(llama, parse_budget("0.99"))
    most = str(error.value).split("at most ")[1].split()[0]
    to_remove(llama, parse_budget(most))


def test_latency_is_not_counted(llama):
    with pytest.raises(ValueError, match="measured"):
        linear_costs(llama, parse_budget("latency-5ms"))
