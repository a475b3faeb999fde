"""Every family on a small random model in double precision, each with the features that its members have."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
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

from numprune.architectures import all_groups, decoder_blocks, linear
from numprune.capture import capture
from numprune.parity import slice_units, zero_units
from numprune.ragged import LAYOUTS
from tests.numprune.conftest import SIZES, random_model

_SMALL: dict[str, Any] = SIZES | {"vocab_size": 64, "num_hidden_layers": 2, "pad_token_id": None}
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
    "olmo2": Olmo2Config(**_SMALL | _MULTI_HEAD, attention_bias=True),
    "olmo3": Olmo3Config(**_SMALL | _ALTERNATING),
    "stablelm": StableLmConfig(**_SMALL | _PARTIAL_ROTARY, use_qkv_bias=True, qk_layernorm=True),
    "stablelm-parallel": StableLmConfig(**_SMALL | _PARTIAL_ROTARY, use_parallel_residual=True),
    "cohere": CohereConfig(**_SMALL, use_qk_norm=True, logit_scale=0.3),
    "cohere2": Cohere2Config(**_SMALL | _ALTERNATING, attention_bias=True),
    "gpt_neox": GPTNeoXConfig(**_SMALL | _PARTIAL_ROTARY),
    "gpt_neox-sequential": GPTNeoXConfig(**_SMALL, use_parallel_residual=False, attention_bias=False),
    "opt": OPTConfig(**_SMALL, ffn_dim=40, word_embed_proj_dim=32),
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


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(_SMALL["vocab_size"], (6, 24), generator=torch.Generator().manual_seed(1))


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
def test_nothing_removed_is_the_same_model(model, input_ids):
    every = {group.name: torch.arange(group.units) for group in all_groups(model)}
    assert torch.equal(changed(slice_units, model, every)(input_ids).logits, model(input_ids).logits)


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
