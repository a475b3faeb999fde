"""Models that hold a language model among other parts: Janus and Emu3, which write text and images with one LLaMA.

What prunes a language model prunes the one inside; the other parts, such as vision encoder, image tokenizer and head
for image tokens, stay as they are. The language model shares its modules with the whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Emu3ForConditionalGeneration,
    Emu3TextConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from numprune.errors import NumpruneError
from numprune.ragged_multimodal import RaggedEmu3ForConditionalGeneration, RaggedJanusForConditionalGeneration

AUTO_CLASS = "AutoModelForImageTextToText"


@dataclass(frozen=True)
class Holder:
    """A family of models that hold a language model.

    Attributes:
        stock: Its class in transformers.
        ragged: The class for language models whose layers differ in width.
        decoder: Path of the language model without its head, which is `lm_head`.
        language: Class of the language model's own configuration; None: any that transformers knows.
    """

    stock: Any
    ragged: Any
    decoder: str
    language: Any = None


HOLDERS: Mapping[str, Holder] = {
    "janus": Holder(JanusForConditionalGeneration, RaggedJanusForConditionalGeneration, "model.language_model"),
    "emu3": Holder(
        Emu3ForConditionalGeneration, RaggedEmu3ForConditionalGeneration, "model.text_model", Emu3TextConfig
    ),
}


def holder_of(config: PreTrainedConfig) -> Holder | None:
    """How a model of this configuration holds a language model; None if it is one."""
    return HOLDERS.get(config.model_type.removeprefix("ragged_"))


def model_class(config: PreTrainedConfig) -> Any:
    """The class that loads a model of this configuration as a whole."""
    holder = holder_of(config)
    if holder is None:
        return AutoModelForCausalLM
    return holder.ragged if config.model_type.startswith("ragged_") else holder.stock


def language_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of the language model in a model of this configuration, which may be all there is.

    Raises:
        NumpruneError: If it is no LLaMA.
    """
    holder = holder_of(config)
    if holder is None:
        return config
    inside: PreTrainedConfig = config.get_text_config()
    if holder.language and isinstance(inside, holder.language):
        known = LlamaConfig().to_dict().keys() - {"model_type", "architectures"}
        return LlamaConfig(**{name: value for name, value in inside.to_dict().items() if name in known})
    # Mistral computes the same without a window; numprune writes it where LLaMA refuses a number of heads.
    if inside.model_type.removeprefix("ragged_") not in {"llama", "mistral"}:
        raise NumpruneError(
            f"The language model of this {config.model_type} is {inside.model_type}; only LLaMA is supported."
        )
    return inside


def language_model(whole: PreTrainedModel) -> PreTrainedModel:
    """The language model in a model, with its head for text; modules are shared, not copied.

    Raises:
        NumpruneError: If it is no LLaMA.
    """
    holder, inside = holder_of(whole.config), whole
    if holder is not None:
        config = language_config(whole.config)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        model.model, model.lm_head = whole.get_submodule(holder.decoder), whole.lm_head
        inside = model.eval()
    return inside


def around(language: PreTrainedModel, dense: PreTrainedModel, *, ragged: bool) -> PreTrainedModel:
    """A whole like a dense one, with another language model inside.

    Args:
        language: To put in; its tensors become the whole's.
        dense: The dense whole that gives the other parts.
        ragged: Whether layers of the language model differ in width.
    """
    holder: Any = holder_of(dense.config)
    inside, settings = language.config, dense.config.to_dict()
    for name in ("model_type", "architectures", "auto_map"):
        settings.pop(name, None)
    if holder.language and not ragged:
        own = dense.config.get_text_config().to_dict()
        widths = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")
        inside = holder.language(**own | {name: getattr(inside, name) for name in widths})
    made = holder.ragged if ragged else holder.stock
    config = made.config_class(**settings | {"text_config": inside.to_dict()})
    with torch.device("meta"):
        whole: PreTrainedModel = made(config)
    head = "lm_head.weight"
    state = {name: t for name, t in dense.state_dict().items() if not name.startswith((f"{holder.decoder}.", head))}
    for name, tensor in language.state_dict().items():
        state[name if name == head else f"{holder.decoder}.{name.removeprefix('model.')}"] = tensor
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    if ragged:
        made.config_class.register_for_auto_class()
        made.register_for_auto_class(AUTO_CLASS)
    return whole.eval()
