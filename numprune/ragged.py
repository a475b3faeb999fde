"""Models whose layers differ in width: what a pruned checkpoint needs to load.

This file is shipped beside the weights of every pruned checkpoint and depends on nothing but torch and transformers.
Layer sizes come from `per_layer_config` in `config.json`; where one is 0 the whole module is absent. `consumer_bias`
gives all output projections a bias. Everything else is the stock model of the family.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


class AbsentAttention(nn.Module):
    """Stands where a block has no attention: adds nothing to the hidden states, but counts tokens in the cache.

    Attributes:
        layer_idx: Index of the block.
        head_dim: Channels of a head in the other blocks.
    """

    is_absent = True

    def __init__(self, layer_idx: int, head_dim: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = head_dim

    def forward(
        self, hidden_states: Tensor, past_key_values: Cache | None = None, **_kwargs: Any
    ) -> tuple[Tensor, None]:
        """Gives zeros, and no attention weights."""
        if past_key_values is not None:
            # Positions and masks come from the length of one layer's cache, which may be this one's. A growing cache
            # takes keys without elements for no keys at all; a static one has the heads of the configuration, none.
            heads, channels = (0, self.head_dim) if past_key_values.is_compileable else (1, 1)
            states = hidden_states.new_zeros(len(hidden_states), heads, hidden_states.shape[1], channels)
            past_key_values.update(states, states, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class AbsentMLP(nn.Module):
    """Stands where a block has no MLP: adds nothing to the hidden states."""

    is_absent = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Gives zeros."""
        return torch.zeros_like(hidden_states)


class _RaggedConfig(PreTrainedConfig):
    consumer_bias: bool = False

    def validate_architecture(self) -> None:
        """Lets layers have head counts that do not divide the hidden size: `head_dim` is given."""

    def validate(self) -> None:
        """Leaves out the family's own checks, which read one head count for all layers."""
        PreTrainedConfig.validate(self)  # type: ignore[attr-defined]  # Added by a decorator.


class RaggedLlamaConfig(_RaggedConfig, LlamaConfig):
    """A LLaMA configuration with layers of different widths."""

    model_type = "ragged_llama"


class RaggedMistralConfig(_RaggedConfig, MistralConfig):
    """A Mistral configuration with layers of different widths."""

    model_type = "ragged_mistral"


class RaggedQwen2Config(_RaggedConfig, Qwen2Config):
    """A Qwen2 configuration with layers of different widths."""

    model_type = "ragged_qwen2"


class RaggedQwen3Config(_RaggedConfig, Qwen3Config):
    """A Qwen3 configuration with layers of different widths."""

    model_type = "ragged_qwen3"


class _RaggedModel(PreTrainedModel):
    """Builds the family's stock model, then gives the projections of every layer their own widths."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        # The stock constructors read one width for all layers; what they build is replaced right after.
        widths = config.to_dict().get("per_layer_config")
        config.per_layer_config = None
        super().__init__(config, *args, **kwargs)
        config.per_layer_config = widths
        for block, layer in zip(self.get_decoder().layers, config.per_layer_config, strict=True):
            if layer.num_attention_heads:
                _resize_attention(block.self_attn, layer)
            else:
                block.self_attn = AbsentAttention(block.self_attn.layer_idx, block.self_attn.head_dim)
            if layer.intermediate_size:
                _resize_mlp(block.mlp, layer)
            else:
                block.mlp = AbsentMLP()


def _resize_attention(attention: Any, layer: Any) -> None:
    queries = layer.num_attention_heads * attention.head_dim
    keys = layer.num_key_value_heads * attention.head_dim
    attention.q_proj = _resized(attention.q_proj, outputs=queries)
    attention.k_proj = _resized(attention.k_proj, outputs=keys)
    attention.v_proj = _resized(attention.v_proj, outputs=keys)
    attention.o_proj = _resized(attention.o_proj, inputs=queries, bias=layer.consumer_bias)
    attention.num_key_value_groups = layer.num_attention_heads // layer.num_key_value_heads


def _resize_mlp(mlp: Any, layer: Any) -> None:
    mlp.gate_proj = _resized(mlp.gate_proj, outputs=layer.intermediate_size)
    mlp.up_proj = _resized(mlp.up_proj, outputs=layer.intermediate_size)
    mlp.down_proj = _resized(mlp.down_proj, inputs=layer.intermediate_size, bias=layer.consumer_bias)


def _resized(
    layer: nn.Linear, *, inputs: int | None = None, outputs: int | None = None, bias: bool = False
) -> nn.Linear:
    return nn.Linear(
        inputs or layer.in_features,
        outputs or layer.out_features,
        bias=bias or layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )


class RaggedLlamaForCausalLM(_RaggedModel, LlamaForCausalLM):
    """LLaMA with layers of different widths."""

    config_class = RaggedLlamaConfig


class RaggedMistralForCausalLM(_RaggedModel, MistralForCausalLM):
    """Mistral with layers of different widths."""

    config_class = RaggedMistralConfig


class RaggedQwen2ForCausalLM(_RaggedModel, Qwen2ForCausalLM):
    """Qwen2 with layers of different widths."""

    config_class = RaggedQwen2Config


class RaggedQwen3ForCausalLM(_RaggedModel, Qwen3ForCausalLM):
    """Qwen3 with layers of different widths."""

    config_class = RaggedQwen3Config


# By the model type of the dense family.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (RaggedLlamaConfig, RaggedLlamaForCausalLM),
    "mistral": (RaggedMistralConfig, RaggedMistralForCausalLM),
    "qwen2": (RaggedQwen2Config, RaggedQwen2ForCausalLM),
    "qwen3": (RaggedQwen3Config, RaggedQwen3ForCausalLM),
}
