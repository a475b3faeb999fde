"""Small random models of a family: what is true of the shapes of a large model can be tried in a second."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_KEY_VALUE_HEADS = 4
_QUERIES_PER_KEY = 2
_HEAD_DIM = 16
_CHANNELS = 48
_VOCABULARY = 128
_WINDOW = 8


def miniature(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A small model with the features of a configuration, in double precision; biases and norms are random as well.

    Fewer heads, channels, layers and words, and a window that a short text outgrows; the kind of attention, biases,
    norms, soft caps, rotary embeddings and tied weights are those of the configuration. Every type of layer occurs.

    Args:
        config: Of a model of any size.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(_small(config)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _small(config: PreTrainedConfig) -> PreTrainedConfig:
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    small_keys = min(keys, _KEY_VALUE_HEADS)
    queries = small_keys * min(heads // keys, _QUERIES_PER_KEY)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":  # Which has a factor for each channel.
        head_dim = min(head_dim, _HEAD_DIM)
    types = list(getattr(config, "layer_types", None) or [])
    layers = max([2, *(types.index(kind) + 1 for kind in set(types))])
    sizes = {
        "num_attention_heads": queries,
        "num_key_value_heads": small_keys,
        "head_dim": head_dim,
        "hidden_size": queries * head_dim,
        "intermediate_size": _CHANNELS,
        "ffn_dim": _CHANNELS,
        "word_embed_proj_dim": queries * head_dim,
        "num_hidden_layers": layers,
        "vocab_size": _VOCABULARY,
        "codebook_size": _VOCABULARY,
        "sliding_window": _WINDOW,
        "layer_types": types[:layers],
        "no_rope_layers": list(getattr(config, "no_rope_layers", None) or [])[:layers],
    }
    # What the family does not have, or has switched off, stays so.
    smaller = {name: value for name, value in sizes.items() if getattr(config, name, None)}
    no_tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return type(config).from_dict(config.to_dict() | smaller | no_tokens)
