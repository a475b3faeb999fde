"""Janus and Emu3 around a language model whose layers differ in width: what such a checkpoint needs to load.

Like `ragged.py`, this file lies beside the weights and depends on torch and transformers. The language model inside is
a LLaMA; that of Emu3 computes what a LLaMA computes.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import (
    AutoModel,
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    PreTrainedConfig,
)

# Relative, because transformers ships files that are imported in this way along with this one.
from .ragged import DECODERS, FAMILIES, alike

_LANGUAGE_CONFIG = FAMILIES["llama"][0]
_LANGUAGE_MODEL = DECODERS["llama"]
# Where a configuration says of which classes its parts are; its older name in transformers, which vLLM still has.
_SUB_CONFIGS = "sub_configs_defaults" if hasattr(PreTrainedConfig, "sub_configs_defaults") else "sub_configs"
# Janus asks for its language model by the configuration's class.
AutoModel.register(_LANGUAGE_CONFIG, _LANGUAGE_MODEL, exist_ok=True)


class RaggedJanusConfig(JanusConfig):
    """Configuration of a Janus whose language model has layers of different widths."""

    model_type = "ragged_janus"
    vars()[_SUB_CONFIGS] = getattr(JanusConfig, _SUB_CONFIGS) | {"text_config": _LANGUAGE_CONFIG}


class RaggedJanusForConditionalGeneration(JanusForConditionalGeneration):
    """Janus whose language model has layers of different widths."""

    config_class = RaggedJanusConfig


@strict
class RaggedEmu3Config(Emu3Config):
    """Configuration of an Emu3 whose language model has layers of different widths."""

    model_type = "ragged_emu3"
    # Emu3 itself takes configurations of its own kind alone.
    text_config: dict[str, Any] | PreTrainedConfig | None = None  # type: ignore[assignment]
    vars()[_SUB_CONFIGS] = getattr(Emu3Config, _SUB_CONFIGS) | {"text_config": _LANGUAGE_CONFIG}


class RaggedEmu3ForConditionalGeneration(Emu3ForConditionalGeneration):
    """Emu3 whose language model has layers of different widths."""

    config_class = RaggedEmu3Config

    def __init__(self, config: Any) -> None:
        with alike(config.text_config):  # What the stock constructor builds is replaced right after.
            super().__init__(config)
        self.model.text_model = _LANGUAGE_MODEL(config.text_config)
        self.post_init()
