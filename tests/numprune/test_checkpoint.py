import json
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from numprune.architectures import all_groups, prunable_groups
from numprune.calibration import draw_samples
from numprune.capture import capture
from numprune.checkpoint import check_output, check_space, fingerprint, load_model
from numprune.errors import NumpruneError
from numprune.plan import PruningPlan, Source, make_plan
from numprune.pruning import apply_plan, capture_to
from numprune.recipe import Recipe
from numprune.samples import load_samples
from numprune.saving import save_pruned
from numprune.slicing import add_bias
from numprune.statistics import Measured
from tests.numprune.conftest import CONFIGS, choose

INPUT_IDS = torch.randint(300, (12, 24), generator=torch.Generator().manual_seed(1))


# The first block's attention, the second block's MLP and all of the third.
DEPTH = ("0.attention", "1.mlp", "2.attention", "2.mlp")
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}


def pruned(folder, statistics, ratio=0.4, gone=(), recovery="least_squares"):
    """A model pruned by the library's steps and, where they are named, of whole modules; and its plan."""
    model = load_model(folder)
    list(capture_to(statistics, model, INPUT_IDS, batch_size=4))
    measured = Measured(statistics, INPUT_IDS, batch_size=4)
    groups = all_groups(model)
    source = Source(str(folder), None, fingerprint(folder), "none")
    plan = make_plan(groups, choose(model, measured, ratio), str(ratio), source=source, recipe=Recipe())
    removed = {name: replace(plan.groups[name], kept=(), lowest_kept=None) for name in gone}
    plan = replace(plan, groups={**plan.groups, **removed})
    list(apply_plan(model, plan, measured, recovery=recovery))
    return model, plan


@pytest.fixture
def saved(make_checkpoint, tmp_path):
    dense = make_checkpoint()
    model, plan = pruned(dense, tmp_path / "statistics")
    save_pruned(model, dense, tmp_path / "pruned", plan, INPUT_IDS)
    return model, tmp_path / "pruned"


@pytest.fixture
def saved_depth(make_checkpoint, tmp_path):
    """With absent modules and biases that the family does not know."""
    dense = make_checkpoint()
    model, plan = pruned(dense, tmp_path / "statistics", gone=DEPTH, recovery="bias")
    save_pruned(model, dense, tmp_path / "depth", plan, INPUT_IDS)
    return model, tmp_path / "depth"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_comes_back_as_it_was(make_checkpoint, tmp_path, name, input_ids):
    dense = make_checkpoint(CONFIGS[name])
    model, plan = pruned(dense, tmp_path / "statistics")
    save_pruned(model, dense, tmp_path / "pruned", plan, INPUT_IDS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)
    assert loaded.num_parameters() == model.num_parameters() < load_model(dense).num_parameters()
    expected = model.generate(input_ids[:3], use_cache=False, **GREEDY)
    assert torch.equal(loaded.generate(input_ids[:3], **GREEDY), expected)
    assert torch.equal(loaded.generate(input_ids[:3], cache_implementation="static", **GREEDY), expected)


@pytest.mark.parametrize("recovery", ["least_squares", "bias"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_comes_back_without_whole_modules(make_checkpoint, tmp_path, name, recovery, input_ids):
    dense = make_checkpoint(CONFIGS[name])
    model, plan = pruned(dense, tmp_path / "statistics", gone=DEPTH, recovery=recovery)
    save_pruned(model, dense, tmp_path / "pruned", plan, INPUT_IDS)
    assert all(p.numel() for p in load_file(tmp_path / "pruned" / "model.safetensors").values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert prunable_groups(loaded) == prunable_groups(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)
    mask = torch.ones_like(input_ids[:3])
    mask[0, :5] = 0
    expected = model.generate(input_ids[:3], attention_mask=mask, use_cache=False, **GREEDY)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(loaded.generate(input_ids[:3], attention_mask=mask, **GREEDY, **options), expected)


def test_a_checkpoint_without_any_attention_generates(make_checkpoint, tmp_path, input_ids):
    dense = make_checkpoint()
    gone = [f"{block}.attention" for block in range(3)]
    model, plan = pruned(dense, tmp_path / "statistics", gone=gone)
    save_pruned(model, dense, tmp_path / "pruned", plan, INPUT_IDS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    expected = model.generate(input_ids[:3], use_cache=False, **GREEDY)
    assert torch.equal(loaded.generate(input_ids[:3], **GREEDY), expected)


def test_all_consumers_get_a_bias_if_one_has_one(make_checkpoint, tmp_path, input_ids):
    """Also those that the family gives none; a configuration that gives them anyway says nothing of it."""
    dense = make_checkpoint()
    model, plan = pruned(dense, tmp_path / "statistics", gone=["0.mlp"])
    add_bias(model.model.layers[1].mlp.down_proj, torch.ones(32))
    save_pruned(model, dense, tmp_path / "biased", plan, INPUT_IDS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "biased")
    assert loaded.config.consumer_bias
    biases = {name: bias.abs().max().item() for name, bias in loaded.state_dict().items() if name.endswith("bias")}
    expected = [f"{block}.self_attn.o_proj" for block in range(3)] + [f"{block}.mlp.down_proj" for block in (1, 2)]
    assert biases == {f"model.layers.{path}.bias": float(path == "1.mlp.down_proj") for path in expected}
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)

    stock = make_checkpoint(CONFIGS["llama-multi-head"], "stock")
    model, plan = pruned(stock, tmp_path / "statistics", recovery="bias")
    save_pruned(model, stock, tmp_path / "same", plan, INPUT_IDS)
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "same").config.consumer_bias


@pytest.mark.parametrize("kind", ["saved", "saved_depth"])
def test_loads_where_numprune_is_not_installed(kind, input_ids, request):
    model, folder = request.getfixturevalue(kind)
    script = f"""
import sys
sys.modules["numprune"] = None  # Importing it fails, as if it were not there.
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(type(model).__module__.split(".")[0])
input_ids = torch.tensor({input_ids[:1].tolist()})
print(model.generate(input_ids, do_sample=False, max_new_tokens=5)[0].tolist())
print(model(input_ids).logits.tolist())
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert printed[0] == "transformers_modules"
    expected = model.generate(input_ids[:1], do_sample=False, max_new_tokens=5)[0].tolist()
    assert json.loads(printed[1]) == expected
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(json.loads(printed[2])), model(input_ids[:1]).logits)


def test_carries_tokenizer_plan_and_configuration(saved):
    _, folder = saved
    assert AutoTokenizer.from_pretrained(folder)("def")["input_ids"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (folder.parent / "dense" / name).read_bytes()
    plan = PruningPlan.load(folder / "pruning_plan.json")
    layers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["per_layer_config"]
    assert [layer["intermediate_size"] for layer in layers.values()] == [len(plan.kept(f"{i}.mlp")) for i in range(3)]
    assert torch.equal(load_samples(folder / "calibration" / "input_ids.safetensors").input_ids, INPUT_IDS)
    assert not list(folder.glob("*.bin"))


def test_keeps_the_data_type_of_the_source(make_checkpoint, tmp_path):
    dense = make_checkpoint()
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).save_pretrained(dense)
    model, plan = pruned(dense, tmp_path / "statistics")
    save_pruned(model.float(), dense, tmp_path / "pruned", plan, INPUT_IDS)
    weights = load_file(tmp_path / "pruned" / "model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16}


def test_generation_settings_that_transformers_would_not_save_are_carried_over(make_checkpoint, tmp_path):
    """As in LLaMA-2's published checkpoints: a temperature without sampling."""
    dense = make_checkpoint()
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
    (dense / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model, plan = pruned(dense, tmp_path / "statistics")
    save_pruned(model, dense, tmp_path / "pruned", plan, INPUT_IDS)
    assert json.loads((tmp_path / "pruned" / "generation_config.json").read_text(encoding="utf-8")) == settings


@pytest.mark.parametrize("recovery", ["least_squares", "bias", "refit"])
@pytest.mark.parametrize("kind", ["saved", "saved_depth"])
def test_a_pruned_model_can_be_pruned_again(kind, recovery, tmp_path, input_ids, request):
    once, folder = request.getfixturevalue(kind)
    twice, plan = pruned(folder, tmp_path / "again", ratio=0.3, recovery=recovery)
    save_pruned(twice, folder, tmp_path / "twice", plan, INPUT_IDS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert sum(g.parameters for gs in prunable_groups(loaded) for g in gs) == plan.kept_parameters
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids).logits, twice(input_ids).logits)
    assert plan.kept_parameters < sum(g.parameters for gs in prunable_groups(once) for g in gs)


def test_shards_are_read(make_checkpoint, input_ids):
    folder = make_checkpoint(max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert next(capture(load_model(folder), input_ids)).moments


def damage_truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def damage_missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def damage_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def damage_no_weights(folder):
    (folder / "model.safetensors").unlink()


def damage_pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damage_no_config(folder):
    (folder / "config.json").unlink()


def damage_architecture(folder):
    MixtralConfig().save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"model.safetensors is truncated or damaged"),
        (damage_nan, r"model.layers.1.mlp.up_proj.weight holds NaN"),
        (damage_missing_tensor, r"the weights lack model.layers.1.mlp.up_proj.weight"),
        (damage_shape, "cannot be loaded"),
        (damage_no_weights, "holds no weights"),
        (damage_pickle_only, "only as pickles"),
        (damage_no_config, "no usable config.json"),
        (damage_architecture, "'mixtral' is not supported"),
    ],
)
def test_damaged_checkpoints_are_refused(make_checkpoint, damage, message):
    folder = make_checkpoint()
    damage(folder)
    with pytest.raises(NumpruneError, match=message):
        load_model(folder)


def test_a_missing_shard_is_named(make_checkpoint):
    folder = make_checkpoint(max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(NumpruneError, match=f"{shard.name} is missing"):
        load_model(folder)


def test_a_taken_output_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(NumpruneError, match="already holds something"):
        check_output(tmp_path)
    check_output(tmp_path / "new")


def test_a_full_disk_is_found_before_the_work(tmp_path):
    with pytest.raises(NumpruneError, match="are needed"):
        check_space(tmp_path / "new", 10**18)


def test_a_disk_that_fills_up_leaves_nothing_behind(make_checkpoint, tmp_path):
    dense = make_checkpoint()
    model, plan = pruned(dense, tmp_path / "statistics")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # Writing beyond it fails like a full disk.
    try:
        with pytest.raises(NumpruneError, match="cannot be written"):
            save_pruned(model, dense, tmp_path / "out" / "pruned", plan, INPUT_IDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []


def test_text_calibration_uses_the_folders_tokenizer(saved, text_file):
    _, folder = saved
    assert draw_samples(str(text_file), str(folder), samples=2, length=8).input_ids.shape == (2, 8)
