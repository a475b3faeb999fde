"""Janus writes images and text with one language model, a LLaMA; this gives access to it as one.

What prunes a language model prunes it in place, and with it the Janus around it: heads for text and for image tokens,
aligners and vision encoder stay as they are.
"""

from typing import Any

import torch
from transformers import JanusForConditionalGeneration, LlamaForCausalLM

from numprune.errors import NumpruneError


def language_model(janus: JanusForConditionalGeneration) -> LlamaForCausalLM:
    """The language model inside a Janus with its head for text; modules are shared, not copied.

    Raises:
        NumpruneError: If the language model is no LLaMA.
    """
    config: Any = janus.config.get_text_config()
    if config.model_type != "llama":
        raise NumpruneError(f"The language model of this Janus is {config.model_type}; only LLaMA is supported.")
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.model = janus.model.language_model
    model.lm_head = janus.lm_head
    return model.eval()
