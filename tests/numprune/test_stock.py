"""Equal widths in all layers: an ordinary checkpoint, in the family's own class or in one that computes the same."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from numprune import choice
from numprune.allocation import Shapes
from numprune.architectures import all_groups, decoder_blocks, prunable_groups
from numprune.checkpoint import load_model
from numprune.parity import slice_units
from numprune.pruning import capture_to
from numprune.ragged import LAYOUTS
from numprune.recipe import RECIPES
from numprune.saving import save_pruned
from numprune.slicing import add_bias, slice_block
from numprune.statistics import Measured
from numprune.stock import as_stock, head_counts, within_stock
from tests.numprune.conftest import CONFIGS, LLAMA3_ROPE, SIZES, choose, random_model
from tests.numprune.test_families import CONFIGS as FAMILIES

GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


def cut_uniformly(model, attention, mlp=24):
    """Keeps the last units of every group: so many of each kind."""
    for block, groups in zip(decoder_blocks(model), prunable_groups(model), strict=True):
        counts = {"attention": attention, "mlp": mlp}
        kept = {group.name: torch.arange(group.units - counts[group.kind], group.units) for group in groups}
        slice_block(block, groups, kept)
    return model


@pytest.fixture
def save(make_checkpoint, tmp_path):
    """Saves a model made from a configuration and changed; returns the model, the folder and the reason."""

    def run(config, change):
        dense = make_checkpoint(config)
        model = change(load_model(dense, dtype=torch.float32))
        plan = SimpleNamespace(save=Path.touch)
        reason = save_pruned(model, dense, tmp_path / "pruned", plan, torch.zeros(1, 2, dtype=torch.long))
        return model, tmp_path / "pruned", reason

    return run


def assert_same(model, folder, input_ids):
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)
    expected = model.generate(input_ids[:3], use_cache=False, **GREEDY)
    assert torch.equal(loaded.generate(input_ids[:3], **GREEDY), expected)
    return loaded


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llamagen"])
def test_equal_widths_make_a_stock_checkpoint(save, name, input_ids):
    kept = 2 if CONFIGS[name].num_key_value_heads == 4 else 4
    model, folder, reason = save(CONFIGS[name], lambda model: cut_uniformly(model, kept))
    loaded = assert_same(model, folder, input_ids)
    assert type(loaded).__name__ == f"{type(model).__name__}" == reason.partition(":")[0]
    assert type(loaded).__module__.startswith("transformers.models.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, kept)
    assert (config["intermediate_size"], config["head_dim"]) == (24, 4)
    assert not {"auto_map", "per_layer_config"} & config.keys()
    assert not list(folder.glob("*.py"))


# Their stock classes or, for Phi-3's long contexts, configurations take the channels of a head from the head count.
_NO_OTHER_HEAD_COUNT = ("stablelm", "stablelm-parallel", "gpt_neox", "gpt_neox-sequential", "opt", "phi3-long")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_with_half_its_heads_is_saved_in_its_own_class_where_that_can_be(save, name, input_ids):
    def cut(model):
        return cut_uniformly(model, max(1, all_groups(model)[0].units // 2))

    model, folder, _ = save(FAMILIES[name], cut)
    loaded = assert_same(model, folder, input_ids % 64)
    ragged = name in _NO_OTHER_HEAD_COUNT
    assert type(loaded).__name__ == ("Ragged" if ragged else "") + type(model).__name__


@pytest.mark.parametrize("name", FAMILIES)
def test_head_counts_are_those_that_a_stock_class_takes(name):
    """Against what becomes of the model with as many heads."""
    model = random_model(FAMILIES[name])
    group = all_groups(model)[0]
    if name == "llamagen":
        assert within_stock(Shapes(uniform=True), model) == Shapes(uniform=True)
        return
    taken = {
        kept * group.width
        for kept in range(1, group.units + 1)
        if as_stock(cut_uniformly(copy.deepcopy(model), kept, 40)).model
    }
    assert head_counts(model) == taken
    assert within_stock(Shapes(), model) == Shapes()


@pytest.mark.parametrize(("name", "taken"), [("gemma2", "2, 4, 8"), ("gpt_neox", "8")])
def test_uniform_plans_avoid_head_counts_that_the_family_refuses(save, monkeypatch, name, taken, tmp_path):
    ids = torch.arange(12 * 24).view(12, 24) % 61
    recipe = replace(RECIPES["paper"], allocation="uniform", shapes=Shapes(uniform=True))

    def cut_by_plan(model):
        list(capture_to(tmp_path / "statistics", model, ids, batch_size=6))
        measured = Measured(tmp_path / "statistics", ids, batch_size=6)
        slice_units(model, choose(model, measured, 0.25, recipe).kept)
        return model

    model, folder, reason = save(FAMILIES[name], cut_by_plan)
    assert type(assert_same(model, folder, ids)) is LAYOUTS[name].stock
    assert not list(folder.glob("*.py"))
    assert f"of query heads its stock configuration takes {taken}, not other numbers" in reason
    monkeypatch.setattr(choice, "within_stock", lambda shapes, _model: shapes)
    assert as_stock(cut_by_plan(random_model(FAMILIES[name]))).model is None


@pytest.mark.parametrize("settings", [{}, {"rope_parameters": LLAMA3_ROPE}, {"tie_word_embeddings": True}])
def test_head_counts_that_llama_refuses_are_saved_as_mistral(save, settings, input_ids):
    model, folder, reason = save(LlamaConfig(**SIZES | settings), lambda model: cut_uniformly(model, 3))
    loaded = assert_same(model, folder, input_ids)
    assert type(loaded).__name__ == "MistralForCausalLM"
    assert loaded.config.sliding_window is None
    assert "attention_bias" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "refuses the head count" in reason
    assert "(6)" in reason


def test_biases_that_no_stock_class_has_keep_the_own_one(save, input_ids):
    """The sister has no biases; nor has any class one on an output projection alone."""
    model, folder, reason = save(CONFIGS["llama-multi-head"], lambda model: cut_uniformly(model, 6))
    assert type(assert_same(model, folder, input_ids)).__name__ == "RaggedLlamaForCausalLM"
    assert "refuses the head count" in reason

    def biased(model):
        add_bias(model.model.layers[1].mlp.down_proj, torch.ones(32))
        return cut_uniformly(model, 2)

    model, folder, reason = save(CONFIGS["llama"], biased)
    assert type(assert_same(model, folder, input_ids)).__name__ == "RaggedLlamaForCausalLM"
    assert "biases" in reason


def test_a_stock_checkpoint_can_be_pruned_again(save, input_ids, tmp_path):
    _, folder, _ = save(CONFIGS["llama"], lambda model: cut_uniformly(model, 3))
    again = cut_uniformly(load_model(folder, dtype=torch.float32), 2, 16)
    plan = SimpleNamespace(save=Path.touch)
    save_pruned(again, folder, tmp_path / "again", plan, torch.zeros(1, 2, dtype=torch.long))
    assert type(assert_same(again, tmp_path / "again", input_ids)).__name__ == "MistralForCausalLM"


def test_a_family_of_our_own_keeps_its_class(save, input_ids):
    model, folder, reason = save(CONFIGS["llamagen"], lambda model: cut_uniformly(model, 4))
    assert_same(model, folder, input_ids)
    assert "transformers has no class" in reason
    assert (folder / "llamagen.py").is_file()
