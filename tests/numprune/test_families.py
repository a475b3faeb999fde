"""Every family on a small random model in double precision, each with the features that its members have."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from numprune.architectures import after_blocks, all_groups, check_supported, decoder_blocks, layout_of, linear
from numprune.budget import Budget, linear_costs
from numprune.capture import capture
from numprune.checkpoint import load_model, open_model
from numprune.cutting import cut
from numprune.errors import NumpruneError
from numprune.llamagen import LlamaGenConfig
from numprune.miniature import miniature
from numprune.parity import check_parity, slice_units, stock_shapes, zero_units
from numprune.perplexity import window_losses
from numprune.plan import GroupPlan, PruningPlan, Source, make_plan
from numprune.pruning import apply_plan, capture_to
from numprune.ragged import LAYOUTS, Projections
from numprune.recipe import RECIPES
from numprune.saving import save_pruned
from numprune.statistics import Measured
from numprune.streaming import is_streamed
from tests.numprune.conftest import SIZES, choose, random_model

_SMALL: dict[str, Any] = SIZES | {"vocab_size": 64, "num_hidden_layers": 2, "pad_token_id": None}
_UNGROUPED = {key: size for key, size in _SMALL.items() if key not in {"num_key_value_heads", "head_dim"}}
_MULTI_HEAD = {"num_key_value_heads": 8}
_MULTI_QUERY = {"num_key_value_heads": 1}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_PARTIAL_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}

# Each with the shape of attention, the biases, windows, norms, soft caps and kind of block that the family can have.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SMALL | _MULTI_QUERY, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**_SMALL, sliding_window=8),
    "qwen2": Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SMALL),
    "smollm3": SmolLM3Config(**_SMALL, no_rope_layers=[1, 0]),
    "gemma2": Gemma2Config(
        **_SMALL | _ALTERNATING, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=4
    ),
    "gemma3_text": Gemma3TextConfig(**_SMALL | _ALTERNATING, query_pre_attn_scalar=4),
    "phi3": Phi3Config(**_SMALL | _PARTIAL_ROTARY, sliding_window=8),
    "phi3-long": Phi3Config(
        **_SMALL | {"max_position_embeddings": 128},
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.5],
            "long_factor": [2.0, 3.0],
            "original_max_position_embeddings": 16,
        },
    ),
    "olmo2": Olmo2Config(**_SMALL | _MULTI_HEAD, attention_bias=True),
    "olmo3": Olmo3Config(**_SMALL | _ALTERNATING),
    "stablelm": StableLmConfig(**_SMALL | _PARTIAL_ROTARY, use_qkv_bias=True, qk_layernorm=True),
    "stablelm-parallel": StableLmConfig(**_SMALL | _PARTIAL_ROTARY, use_parallel_residual=True),
    "cohere": CohereConfig(**_SMALL, use_qk_norm=True, logit_scale=0.3),
    "cohere2": Cohere2Config(**_SMALL | _ALTERNATING, attention_bias=True),
    "gpt_neox": GPTNeoXConfig(**_UNGROUPED | _PARTIAL_ROTARY),
    "gpt_neox-sequential": GPTNeoXConfig(**_UNGROUPED, use_parallel_residual=False, attention_bias=False),
    "llamagen": LlamaGenConfig(**_SMALL | _MULTI_HEAD, codebook_size=64, grid_size=8, num_classes=10),
    "opt": OPTConfig(**_UNGROUPED, ffn_dim=40, word_embed_proj_dim=32),
}
assert {config.model_type for config in CONFIGS.values()} == LAYOUTS.keys()


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return random_model(CONFIGS[request.param]).double()


@pytest.fixture
def kept(model):
    """A few units of every group, other numbers in every block."""
    generator = torch.Generator().manual_seed(0)
    chosen = {}
    for group in all_groups(model):
        count = 1 + (3 * group.block + 2) % max(group.units - 1, 1)
        chosen[group.name] = torch.randperm(group.units, generator=generator)[:count].sort().values
    return chosen


INPUT_IDS = torch.randint(_SMALL["vocab_size"], (16, 24), generator=torch.Generator().manual_seed(1))
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
SOURCE = Source("", None, "", "")
PLAN = PruningPlan(SOURCE, {}, "0.5", 0.0, {"0.mlp": GroupPlan(40, (), 64, None, None)})


@pytest.fixture
def input_ids() -> torch.Tensor:
    return INPUT_IDS[:6]


@pytest.fixture(scope="module", params=CONFIGS)
def pruned(request, tmp_path_factory):
    """Folders of a dense model and of what the recipe `best` makes of it, and the pruned model as it was saved."""
    folder = tmp_path_factory.mktemp(request.param)
    random_model(CONFIGS[request.param]).save_pretrained(folder / "dense")
    model = load_model(folder / "dense")
    plan = prune(model, folder / "statistics", RECIPES["best"])
    save_pruned(model, folder / "dense", folder / "pruned", plan, INPUT_IDS)
    return folder, model


def prune(model, statistics, recipe):
    list(capture_to(statistics, model, INPUT_IDS, batch_size=8))
    measured = Measured(statistics, INPUT_IDS, batch_size=8)
    choice = choose(model, measured, 0.3, recipe)
    plan = make_plan(all_groups(model), choice, "0.3", source=SOURCE, recipe=recipe)
    list(apply_plan(model, plan, measured, recovery=recipe.recovery, damping=recipe.damping))
    return plan


def changed(change, model, kept):
    result = copy.deepcopy(model)
    change(result, kept)
    return result


@torch.no_grad()
def test_sliced_equals_zeroed(model, kept, input_ids):
    smaller = changed(slice_units, model, kept)
    expected = changed(zero_units, model, kept)(input_ids).logits
    # Norms and softmax compute in single precision whatever the model's is.
    assert (smaller(input_ids).logits - expected).norm() < 1e-6 * expected.norm()
    assert (expected - model(input_ids).logits).norm() > 0.01 * expected.norm()


@torch.no_grad()
def test_absent_modules_add_nothing(model, kept, input_ids):
    kept = kept | dict.fromkeys(("0.attention", "1.mlp"), torch.tensor([], dtype=torch.long))
    smaller = changed(slice_units, model, kept)
    expected = changed(zero_units, model, kept)(input_ids).logits
    assert (smaller(input_ids).logits - expected).norm() < 1e-6 * expected.norm()
    uncached = smaller.generate(input_ids, use_cache=False, **GREEDY)
    assert torch.equal(smaller.generate(input_ids, **GREEDY), uncached)


@torch.no_grad()
def test_nothing_removed_is_the_same_model(model, input_ids):
    every = {group.name: torch.arange(group.units) for group in all_groups(model)}
    assert torch.equal(changed(slice_units, model, every)(input_ids).logits, model(input_ids).logits)


@torch.no_grad()
def test_recovery_of_a_whole_model_changes_next_to_nothing(model, input_ids, tmp_path):
    list(capture_to(tmp_path, model, input_ids, batch_size=4))
    every = {group.name: torch.arange(group.units) for group in all_groups(model)}
    recovered = copy.deepcopy(model)
    list(cut(recovered, every, Measured(tmp_path, input_ids, batch_size=4), recovery="refit"))
    expected = model(input_ids).logits
    assert (recovered(input_ids).logits - expected).norm() < 1e-5 * expected.norm()


@torch.no_grad()
def test_losses_are_those_of_a_whole_forward_pass(model, input_ids):
    """Scales and soft caps of the logits count."""
    scores = model(input_ids).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(scores.transpose(1, 2), input_ids[:, 1:], reduction="none").sum(1)
    found = torch.cat(list(window_losses(model, input_ids, batch_size=4)))
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)


def test_a_unit_costs_the_cache_that_its_layer_really_keeps(model):
    """Some layers of some families have a window: against the keys and values in a cache after twice its length."""
    with torch.no_grad():
        cache = model(INPUT_IDS[:1, :16], use_cache=True).past_key_values
    costs = linear_costs(model, Budget("memory", 1, batch=1, length=16))
    for group in all_groups(model):
        if group.kind == "attention":
            layer = cache.layers[group.block]
            elements = 2 * min(16, getattr(layer, "sliding_window", 16)) * layer.keys.shape[-1]
            assert costs.unit[group.name] == (group.unit_parameters + elements) * model.dtype.itemsize


@torch.no_grad()
def test_block_by_block_equals_one_forward_pass(model, input_ids):
    seen = {}
    for group in all_groups(model):

        def keep(_module, inputs, name=group.name):
            seen[name] = inputs[0].flatten(0, -2)

        linear(decoder_blocks(model)[group.block], group.consumer).register_forward_pre_hook(keep)
    model(input_ids)
    expected = dict(seen)
    moments = {
        name: found for block in capture(model, input_ids, batch_size=4) for name, found in block.moments.items()
    }
    assert moments.keys() == expected.keys()
    for name, rows in expected.items():
        torch.testing.assert_close(moments[name].gram, rows.T @ rows, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments[name].mean, rows.mean(0), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_recipes_prune_every_family_and_recovery_brings_it_nearer(pruned, tmp_path):
    folder, best = pruned
    dense = load_model(folder / "dense")
    expected = dense.get_decoder()(INPUT_IDS).last_hidden_state
    errors = {}
    for recovery in ("none", "least_squares"):
        model = copy.deepcopy(dense)
        plan = prune(model, tmp_path / recovery, replace(RECIPES["paper"], recovery=recovery))
        assert (
            sum(group.parameters for group in all_groups(model)) == plan.kept_parameters < 0.75 * plan.dense_parameters
        )
        errors[recovery] = (model.get_decoder()(INPUT_IDS).last_hidden_state - expected).norm()
    errors["best"] = (best.get_decoder()(INPUT_IDS).last_hidden_state - expected).norm()
    assert errors["best"] < errors["least_squares"] < errors["none"]


@torch.no_grad()
def test_a_saved_model_comes_back_and_generates_with_its_cache(pruned, input_ids):
    folder, model = pruned
    loaded = AutoModelForCausalLM.from_pretrained(folder / "pruned")
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    expected = model.generate(input_ids, attention_mask=mask, use_cache=False, **GREEDY)
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(loaded.generate(input_ids, attention_mask=mask, **GREEDY, **cache), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_in_checkpoints_are_the_familys(name, tmp_path):
    """Read block by block, and written where equal widths make an ordinary one; GPT-NeoX's modules have other names."""
    random_model(CONFIGS[name]).save_pretrained(tmp_path / "dense")
    model, opened = load_model(tmp_path / "dense"), open_model(tmp_path / "dense")
    assert is_streamed(decoder_blocks(opened))
    losses = [torch.cat(list(window_losses(m, INPUT_IDS, batch_size=8))) for m in (model, opened)]
    assert torch.equal(*losses)
    slice_units(model, {g.name: torch.arange(g.units - (g.kind == "mlp")) for g in all_groups(model)})
    save_pruned(model, tmp_path / "dense", tmp_path / "pruned", PLAN, INPUT_IDS)
    dense, pruned = (load_file(tmp_path / form / "model.safetensors") for form in ("dense", "pruned"))
    assert dense.keys() == pruned.keys()


@torch.no_grad()
def test_every_family_loads_where_numprune_is_not_installed(tmp_path, input_ids):
    """With whole modules gone, which the file beside the weights has to know too."""
    expected = []
    for name, config in CONFIGS.items():
        model = random_model(config)
        model.save_pretrained(tmp_path / name / "dense")
        kept = {group.name: torch.arange(1 + group.units // 2 % group.units) for group in all_groups(model)}
        slice_units(model, kept | dict.fromkeys(("0.mlp", "1.attention"), torch.tensor([], dtype=torch.long)))
        save_pruned(model, tmp_path / name / "dense", tmp_path / name / "pruned", PLAN, INPUT_IDS)
        expected.append(model(input_ids[:1]).logits[0, -1].tolist())
    script = f"""
import sys
sys.modules["numprune"] = None  # Importing it fails, as if it were not there.
import json
import torch
from transformers import AutoModelForCausalLM
input_ids = torch.tensor({input_ids[:1].tolist()})
for name in {list(CONFIGS)}:
    model = AutoModelForCausalLM.from_pretrained(f"{tmp_path}/{{name}}/pruned", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    print(json.dumps(model(input_ids).logits[0, -1].tolist()))
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in printed.splitlines()]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


@torch.no_grad()
def test_the_last_norm_is_the_best_factor_of_every_channel(model, kept, input_ids, tmp_path):
    """Against least squares, channel by channel, of what the norm gives before it adds its bias."""
    list(capture_to(tmp_path, model, input_ids, batch_size=4))
    pruned = copy.deepcopy(model)
    list(cut(pruned, kept, Measured(tmp_path, input_ids, batch_size=4), recovery="refit"))
    norm, offset = after_blocks(pruned)[0], layout_of(model.config).norm_offset
    own, refitted = after_blocks(model)[0].weight + offset, norm.weight + offset
    bias = getattr(norm, "bias", None)
    norm.weight.copy_(own - offset)
    found, wanted = (
        m.get_decoder()(input_ids).last_hidden_state.flatten(0, 1) - (0 if bias is None else bias)
        for m in (pruned, model)
    )
    factors = [
        torch.linalg.lstsq(f[:, None], w[:, None]).solution.item() for f, w in zip(found.T, wanted.T, strict=True)
    ]
    torch.testing.assert_close(refitted, own * torch.tensor(factors), rtol=1e-5, atol=1e-6)
    assert (refitted - own).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_miniature_has_the_features_of_its_configuration_and_passes_the_check(name):
    large = copy.deepcopy(CONFIGS[name])
    small = miniature(large)
    assert all(finding.holds for finding in check_parity(small))
    assert large.to_dict() == CONFIGS[name].to_dict()
    assert set(stock_shapes(small)) == {"fewer channels", "fewer heads"}


_NEOX = LAYOUTS["gpt_neox"].attention


@pytest.mark.parametrize(
    ("name", "mistake", "claim"),
    [
        ("phi3", {"attention": Projections({"self_attn.qkv_proj": "q+k+v"}, "self_attn.o_proj")}, "units removed"),
        ("gpt_neox", {"attention": replace(_NEOX, producers={"attention.query_key_value": "q|k|v"})}, "units removed"),
        ("llama", {"mlp": Projections({"mlp.up_proj": "up"}, "mlp.down_proj")}, "every weight"),
        ("cohere", {"attention": LAYOUTS["llama"].attention}, "every weight"),
        ("olmo2", {"attention": replace(LAYOUTS["olmo2"].attention, joint_norms=())}, "units removed"),
        ("gemma2", {"mlp": LAYOUTS["llama"].mlp}, "a block adds"),
        ("gemma2", {"norm_offset": 0.0}, "the last norm"),
    ],
)
def test_the_check_finds_mistakes_in_a_layout(monkeypatch, name, mistake, claim):
    monkeypatch.setitem(LAYOUTS, name, replace(LAYOUTS[name], **mistake))
    failed = [finding.claim for finding in check_parity(miniature(CONFIGS[name])) if not finding.holds]
    assert any(found.startswith(claim) for found in failed)


def test_a_path_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "opt", replace(LAYOUTS["opt"], mlp=Projections({"mlp.fc1": "up"}, "mlp.fc2")))
    with pytest.raises(NumpruneError, match=r"OPTDecoderLayer has no mlp: its family's layout is not right"):
        all_groups(miniature(CONFIGS["opt"]))


def test_what_a_family_cannot_do_is_refused():
    with pytest.raises(NumpruneError, match="do_layer_norm_before=False is not supported"):
        check_supported(OPTConfig(do_layer_norm_before=False))
