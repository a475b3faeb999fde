"""Families of models, and models whose layers differ in width: what a pruned checkpoint needs to load.

This file is shipped beside the weights of every pruned checkpoint and depends on nothing but torch and transformers.
Layer sizes come from `per_layer_config` in `config.json`, under the same three names for every family; where one is 0
the whole module is absent. `consumer_bias` gives all output projections a bias. Everything else is the stock model of
the family.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    Cache,
    Cohere2ForCausalLM,
    CohereForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Olmo3ForCausalLM,
    OPTForCausalLM,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
    StableLmForCausalLM,
)


@dataclass(frozen=True)
class Projections:
    """The linear layers of an attention or an MLP, by their paths inside a decoder block.

    Attributes:
        producers: What the rows of each producer are. `q`, `k` and `v` are the queries, keys and values of an
            attention, `gate` and `up` the channels of an MLP. Of a fused projection `q|k|v` says that the queries of
            all heads come first, then all keys, then all values; `q+k+v` that the rows of one head stand together.
        consumer: The output projection.
        head_norms: Norms that have weights for each head, which go with it; those that a model lacks are passed over. A
            norm that all heads share is none.
        joint_norms: Norms that have weights for each head and whose mean square runs over the channels of all heads.
        post_norm: The norm between the consumer and the residual stream, if there is one.
    """

    producers: Mapping[str, str]
    consumer: str
    head_norms: tuple[str, ...] = ()
    joint_norms: tuple[str, ...] = ()
    post_norm: str | None = None


_ATTENTION = Projections(
    {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v"}, consumer="self_attn.o_proj"
)
_MLP = Projections({"mlp.gate_proj": "gate", "mlp.up_proj": "up"}, consumer="mlp.down_proj")


@dataclass(frozen=True)
class Layout:
    """Where a family of models has what can be pruned; the defaults are LLaMA's.

    Attributes:
        stock: The family's class in transformers.
        attention: The projections of an attention; a unit is a key/value head with the query heads that share it.
        mlp: The projections of an MLP; a unit is a channel.
        head_dim: Name of the attribute of the attention module that holds the channels of a head.
        final: What follows the last block inside the decoder, the norm first; parts that a model lacks are passed over.
        norm_offset: What the norms add to their weight before they multiply by it.
        requires: Settings of the configuration without which the family's blocks are built otherwise.
    """

    stock: type[PreTrainedModel]
    attention: Projections = _ATTENTION
    mlp: Projections = _MLP
    head_dim: str = "head_dim"
    final: tuple[str, ...] = ("norm",)
    norm_offset: float = 0.0
    requires: Mapping[str, Any] = field(default_factory=dict)


_POST_NORM_ATTENTION = replace(_ATTENTION, post_norm="post_attention_layernorm")
_POST_NORM_MLP = replace(_MLP, post_norm="post_feedforward_layernorm")
_OLMO_ATTENTION = replace(_POST_NORM_ATTENTION, joint_norms=("self_attn.q_norm", "self_attn.k_norm"))

# By the model type of the dense family.
LAYOUTS: dict[str, Layout] = {
    "llama": Layout(LlamaForCausalLM),
    "mistral": Layout(MistralForCausalLM),
    "qwen2": Layout(Qwen2ForCausalLM),
    "qwen3": Layout(Qwen3ForCausalLM),
    "smollm3": Layout(SmolLM3ForCausalLM),
    "gemma2": Layout(Gemma2ForCausalLM, attention=_POST_NORM_ATTENTION, mlp=_POST_NORM_MLP, norm_offset=1.0),
    "gemma3_text": Layout(Gemma3ForCausalLM, attention=_POST_NORM_ATTENTION, mlp=_POST_NORM_MLP, norm_offset=1.0),
    "phi3": Layout(
        Phi3ForCausalLM,
        attention=Projections({"self_attn.qkv_proj": "q|k|v"}, consumer="self_attn.o_proj"),
        mlp=Projections({"mlp.gate_up_proj": "gate|up"}, consumer="mlp.down_proj"),
    ),
    "olmo2": Layout(Olmo2ForCausalLM, attention=_OLMO_ATTENTION, mlp=_POST_NORM_MLP),
    "olmo3": Layout(Olmo3ForCausalLM, attention=_OLMO_ATTENTION, mlp=_POST_NORM_MLP),
    "stablelm": Layout(
        StableLmForCausalLM,
        attention=replace(_ATTENTION, head_norms=("self_attn.q_layernorm.norms", "self_attn.k_layernorm.norms")),
    ),
    "cohere": Layout(
        CohereForCausalLM, attention=replace(_ATTENTION, head_norms=("self_attn.q_norm", "self_attn.k_norm"))
    ),
    "cohere2": Layout(Cohere2ForCausalLM),
    "gpt_neox": Layout(
        GPTNeoXForCausalLM,
        attention=Projections({"attention.query_key_value": "q+k+v"}, consumer="attention.dense"),
        mlp=Projections({"mlp.dense_h_to_4h": "up"}, consumer="mlp.dense_4h_to_h"),
        head_dim="head_size",
        final=("final_layer_norm",),
    ),
    "opt": Layout(
        OPTForCausalLM,
        attention=replace(_ATTENTION, consumer="self_attn.out_proj"),
        mlp=Projections({"fc1": "up"}, consumer="fc2"),
        final=("final_layer_norm", "project_out"),
        requires={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    ),
}


def row_counts(rows: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """How many rows each part of a projection has, if a query, key, ... has the given ones; see `Projections`."""
    return tuple(sum(sizes[piece] for piece in part.split("+")) for part in rows.split("|"))


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
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        **_kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Gives zeros, and no attention weights."""
        cache = past_key_values if layer_past is None else layer_past  # The name differs by family.
        if cache is not None:
            # Positions and masks come from the length of one layer's cache, which may be this one's. A growing cache
            # takes keys without elements for no keys at all; a static one has the heads of the configuration, none.
            heads, channels = (0, self.head_dim) if cache.is_compileable else (1, 1)
            states = hidden_states.new_zeros(len(hidden_states), heads, hidden_states.shape[1], channels)
            cache.update(states, states, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class AbsentMLP(nn.Module):
    """Stands where a block has no MLP: adds nothing to the hidden states."""

    is_absent = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Gives zeros."""
        return torch.zeros_like(hidden_states)


def remove_attention(block: nn.Module, path: str, head_dim: int) -> None:
    """Puts an absent attention in the place of one of the given head size."""
    attention: Any = block.get_submodule(path)
    block.set_submodule(path, AbsentAttention(attention.layer_idx, head_dim))


def remove_mlp(block: nn.Module, consumer: str, producers: Iterable[str]) -> None:
    """Puts an absent MLP in the place of one."""
    path = module_path(consumer)
    if path:
        block.set_submodule(path, AbsentMLP())
        return
    # The projections stand in the block itself.
    for producer in producers:
        block.set_submodule(producer, nn.Identity())
    block.set_submodule(consumer, AbsentMLP())


def module_path(consumer: str) -> str:
    """Path of the module that holds an output projection; empty if that is the block."""
    return consumer.rpartition(".")[0]


def set_head_counts(attention: Any, queries: int, keys: int) -> None:
    """Tells an attention module how many heads it has, where its forward pass asks for that."""
    for name, count in {"num_heads": queries, "num_key_value_heads": keys}.items():
        if hasattr(attention, name):
            setattr(attention, name, count)
    if hasattr(attention, "qkv_proj"):  # Phi-3 splits it by the head count of the configuration.
        attention.config = _ConfigOfLayer(attention.config, queries)


class _ConfigOfLayer:
    """A configuration with another head count; everything else is what it is or becomes."""

    def __init__(self, config: Any, num_attention_heads: int) -> None:
        self.config: Any = config.config if isinstance(config, _ConfigOfLayer) else config
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name == "config" or name.startswith("__"):  # Not there yet while a copy is being made.
            raise AttributeError(name)
        return getattr(self.config, name)


def present_norms(block: nn.Module, projections: Projections) -> tuple[str, ...]:
    """Paths of the norms in a block of which each head has a share."""
    modules = dict(block.named_modules())
    return tuple(path for path in (*projections.head_norms, *projections.joint_norms) if path in modules)


def norm_entries(norm: Any) -> int:
    """Weights of a norm along its first dimension, or how many norms there are, one for each head."""
    return len(norm) if isinstance(norm, nn.ModuleList) else len(norm.weight)


def cut_norm(block: nn.Module, path: str, kept: Tensor) -> None:
    """Leaves the given entries of a norm that has weights for each head or channel."""
    norm: Any = block.get_submodule(path)
    if isinstance(norm, nn.ModuleList):
        block.set_submodule(path, nn.ModuleList([norm[entry] for entry in kept.tolist()]))
        return
    for name, parameter in norm.named_parameters():
        setattr(norm, name, nn.Parameter(parameter[kept].contiguous(), requires_grad=parameter.requires_grad))


class RaggedConfig(PreTrainedConfig):
    """What a family's configuration needs to describe layers of different widths."""

    consumer_bias: bool = False

    def validate_architecture(self) -> None:
        """Lets layers have head counts that do not divide the hidden size: `head_dim` is given."""

    def validate(self) -> None:
        """Leaves out the family's own checks, which read one head count for all layers."""
        with alike(self):
            PreTrainedConfig.validate(self)  # type: ignore[attr-defined]  # Added by a decorator.

    def validate_rope(self) -> None:
        """Reads the head count of the dense model, from which some families take the channels of a head."""
        with alike(self):
            super().validate_rope()


@contextmanager
def alike(config: PreTrainedConfig) -> Iterator[None]:
    """Lets code that knows one width for all layers read that of the dense model."""
    widths = config.to_dict().get("per_layer_config")
    config.per_layer_config = None
    try:
        yield
    finally:
        config.per_layer_config = widths


class RaggedModel(PreTrainedModel):
    """Builds the family's stock model, then gives the projections of every layer their own widths."""

    layout: Layout

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        with alike(config):  # What the stock constructors build is replaced right after.
            super().__init__(config, *args, **kwargs)
            decoder = self.get_decoder()
            if hasattr(decoder, "rotary_emb"):  # Some kinds ask for the head count at each forward pass.
                decoder.rotary_emb.config = _ConfigOfLayer(config, config.num_attention_heads)
        for block, layer in zip(decoder.layers, config.per_layer_config, strict=True):
            if layer.num_attention_heads:
                _resize_attention(block, self.layout, layer)
            else:
                path = module_path(self.layout.attention.consumer)
                remove_attention(block, path, getattr(block.get_submodule(path), self.layout.head_dim))
            if layer.intermediate_size:
                sizes = dict.fromkeys(("gate", "up"), layer.intermediate_size)
                _resize(block, self.layout.mlp, sizes, layer.intermediate_size, layer.consumer_bias)
            else:
                remove_mlp(block, self.layout.mlp.consumer, self.layout.mlp.producers)


def _resize_attention(block: nn.Module, layout: Layout, layer: Any) -> None:
    attention: Any = block.get_submodule(module_path(layout.attention.consumer))
    head_dim = getattr(attention, layout.head_dim)
    queries, keys = layer.num_attention_heads, layer.num_key_value_heads
    stock_queries = block.get_submodule(layout.attention.consumer).in_features // head_dim
    for path in present_norms(block, layout.attention):
        entries = norm_entries(block.get_submodule(path)) * queries // stock_queries
        cut_norm(block, path, torch.arange(entries, device="cpu"))
    sizes = {"q": queries * head_dim, "k": keys * head_dim, "v": keys * head_dim}
    _resize(block, layout.attention, sizes, queries * head_dim, layer.consumer_bias)
    set_head_counts(attention, queries, keys)


def _resize(
    block: nn.Module, projections: Projections, sizes: Mapping[str, int], inputs: int, consumer_bias: bool
) -> None:
    for path, rows in projections.producers.items():
        block.set_submodule(path, _resized(block.get_submodule(path), outputs=sum(row_counts(rows, sizes))))
    consumer = block.get_submodule(projections.consumer)
    block.set_submodule(projections.consumer, _resized(consumer, inputs=inputs, bias=consumer_bias))


def _resized(layer: Any, *, inputs: int | None = None, outputs: int | None = None, bias: bool = False) -> nn.Linear:
    return nn.Linear(
        inputs or layer.in_features,
        outputs or layer.out_features,
        bias=bias or layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )


def _ragged_classes(layout: Layout) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """RaggedLlamaConfig and RaggedLlamaForCausalLM for LLaMA, and so on; transformers finds them by name."""
    stock: Any = layout.stock
    settings = {"model_type": f"ragged_{stock.config_class.model_type}"}
    config = _subclass(RaggedConfig, stock.config_class, settings)
    return config, _subclass(RaggedModel, stock, {"config_class": config, "layout": layout})


def _ragged_decoder(layout: Layout, config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    stock: Any = MODEL_MAPPING[layout.stock.config_class]  # type: ignore[index]  # Every stock class has one.
    decoder: type[PreTrainedModel] = _subclass(RaggedModel, stock, {"config_class": config, "layout": layout})
    return decoder


def _subclass(first: type, stock: type, attributes: dict[str, Any]) -> Any:
    name = f"Ragged{stock.__name__}"
    about = {"__module__": __name__, "__doc__": f"{stock.__name__} with layers of different widths."}
    globals()[name] = type(name, (first, stock), about | attributes)
    return globals()[name]


# By the model type of the dense family.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    name: _ragged_classes(layout) for name, layout in LAYOUTS.items()
}
# The same without the output layer, which is how some engines load a model.
DECODERS: dict[str, type[PreTrainedModel]] = {
    name: _ragged_decoder(layout, FAMILIES[name][0]) for name, layout in LAYOUTS.items()
}
