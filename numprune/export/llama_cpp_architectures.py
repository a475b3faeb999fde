"""Architectures of llama.cpp, and which of them a family of models can be written as.

To add one, read its loader and graph in llama.cpp: what of a configuration it reads from the file and what it takes for
granted, how wide its tensors must be, and which channels of a head it turns together.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
from gguf import MODEL_ARCH

from numprune.errors import NumpruneError


@dataclass(frozen=True)
class Target:
    """An architecture of llama.cpp.

    Attributes:
        arch: Which.
        reorder: Whether it turns neighbouring channels of a head, where the family in transformers turns the first half
            with the second.
        per_layer: Whether it reads head and channel counts for every layer.
        rope_factors: Whether it reads factors for the rotary frequencies.
        partial_rotary: Whether it reads how many channels of a head are turned.
        all_heads: Whether its heads fill the hidden size; those that are missing are written as zeros.
        fused: Whether queries, keys and values are one tensor, in this order.
        output: Whether it has an output layer of its own even where embeddings are tied.
        period: Every so many layers one has no window; 0 if none has one.
        biases: Parts of a block that may have a bias.
        query_scale: Path of the weight that takes up the scale of the attention, where that is not read from the file
            and not always the head size to the power of -1/2.
        largest: Layers of the release whose attention it scales by the hidden size over the head count instead.
        activations: Of the MLP, by their names in configurations.
        needs: Settings without which it takes a value of its own.
        requires: Settings of which it knows one value.
    """

    arch: MODEL_ARCH
    reorder: bool = False
    per_layer: bool = False
    rope_factors: bool = False
    partial_rotary: bool = False
    all_heads: bool = False
    fused: bool = False
    output: bool = False
    period: int = 0
    biases: str = ""
    query_scale: str | None = None
    largest: int = 0
    activations: Collection[str] = ("silu",)
    needs: tuple[str, ...] = ()
    requires: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Llama.cpp's name of it."""
        return gguf.MODEL_ARCH_NAMES[self.arch]


_LLAMA = Target(MODEL_ARCH.LLAMA, reorder=True, rope_factors=True, biases="q k v")
_DECI = Target(MODEL_ARCH.DECI, reorder=True, rope_factors=True, per_layer=True, biases="q k v o gate up down")
_QWEN2 = Target(MODEL_ARCH.QWEN2, all_heads=True, biases="q k v")
_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
# What a family can be written as; the first that has a place for everything is taken.
TARGETS: Mapping[str, tuple[Target, ...]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "phi3": (_LLAMA, _DECI),
    "qwen2": (_QWEN2, _DECI),
    "qwen3": (Target(MODEL_ARCH.QWEN3),),
    "smollm3": (Target(MODEL_ARCH.SMOLLM3, reorder=True),),
    "gemma2": (
        Target(
            MODEL_ARCH.GEMMA2,
            period=2,
            query_scale="self_attn.q_proj",
            largest=46,
            activations=_TANH,
            needs=("attn_logit_softcapping", "final_logit_softcapping"),
        ),
    ),
    "gemma3_text": (
        Target(
            MODEL_ARCH.GEMMA3,
            period=6,
            query_scale="self_attn.q_norm",
            largest=62,
            activations=_TANH,
            requires={"attn_logit_softcapping": None, "final_logit_softcapping": None},
        ),
    ),
    "olmo2": (Target(MODEL_ARCH.OLMO2, all_heads=True, output=True),),
    "olmo3": (Target(MODEL_ARCH.OLMO2, all_heads=True, output=True, period=4),),
    "stablelm": (Target(MODEL_ARCH.STABLELM, all_heads=True, partial_rotary=True, output=True, biases="q k v"),),
    # In transformers too these turn neighbouring channels.
    "cohere": (Target(MODEL_ARCH.COMMAND_R, all_heads=True, requires={"use_qk_norm": False}),),
    "cohere2": (Target(MODEL_ARCH.COHERE2, all_heads=True, period=4),),
    "gpt_neox": (
        Target(
            MODEL_ARCH.GPTNEOX,
            all_heads=True,
            partial_rotary=True,
            fused=True,
            output=True,
            biases="q k v o up down",
            activations=("gelu", *_TANH),
        ),
    ),
}


def check_settings(config: Any, target: Target) -> None:
    """Raises NumpruneError if an architecture takes something for granted that a configuration does not have."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    wrong = [] if activation in target.activations else [f"the activation {activation}"]
    wrong += [f"{name}=None" for name in target.needs if getattr(config, name) is None]
    wrong += [
        f"{name}={getattr(config, name)}" for name, value in target.requires.items() if getattr(config, name) != value
    ]
    kinds, period = getattr(config, "layer_types", None) or [], target.period
    if period and any((kind == "full_attention") == bool((layer + 1) % period) for layer, kind in enumerate(kinds)):
        wrong.append(f"layers without a window other than one in {period}")
    turned = getattr(config, "no_rope_layers", None) or []
    if any(bool(turns) != bool((layer + 1) % 4) for layer, turns in enumerate(turned)):
        wrong.append("layers without rotary embeddings other than one in 4")
    if wrong:
        raise NumpruneError(f"llama.cpp's architecture {target.name} does not know {' nor '.join(wrong)}.")
