"""Models whose layers differ in width: what a pruned checkpoint needs to load.

This file is shipped beside the weights of every pruned checkpoint and depends on nothing but transformers. Layer sizes
come from `per_layer_config` in `config.json`; everything else is the stock model of the family.
"""

from typing import Any

from torch import nn
from transformers import (
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


class _RaggedConfig(PreTrainedConfig):
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
            attention, mlp = block.self_attn, block.mlp
            queries = layer.num_attention_heads * attention.head_dim
            keys = layer.num_key_value_heads * attention.head_dim
            attention.q_proj = _resized(attention.q_proj, outputs=queries)
            attention.k_proj = _resized(attention.k_proj, outputs=keys)
            attention.v_proj = _resized(attention.v_proj, outputs=keys)
            attention.o_proj = _resized(attention.o_proj, inputs=queries)
            attention.num_key_value_groups = layer.num_attention_heads // layer.num_key_value_heads
            mlp.gate_proj = _resized(mlp.gate_proj, outputs=layer.intermediate_size)
            mlp.up_proj = _resized(mlp.up_proj, outputs=layer.intermediate_size)
            mlp.down_proj = _resized(mlp.down_proj, inputs=layer.intermediate_size)


def _resized(layer: nn.Linear, *, inputs: int | None = None, outputs: int | None = None) -> nn.Linear:
    return nn.Linear(
        inputs or layer.in_features,
        outputs or layer.out_features,
        bias=layer.bias is not None,
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
