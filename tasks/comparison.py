"""A pruned model beside the dense one: how far its hidden states are off, and how it writes on."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune.generation_benchmark import generate
from numprune.reconstruction import hidden_state_errors
from numprune.samples import Samples
from numprune.streaming import answering

# Windows of the evaluation text, spread over all of it.
_COMPARED_WINDOWS = 8
_PROMPTS = 3
_PROMPT_TOKENS = 64
_NEW_TOKENS = 48


def compare(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    uncompensated: PreTrainedModel,
    windows: Samples,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Compares models on the evaluation text.

    Args:
        dense: The dense model.
        pruned: The finished one.
        uncompensated: The same cut without any compensation.
        windows: Of the evaluation text.
        tokenizer: None: nothing is generated.
        device: Where to compute.
    """
    compared = _spread(windows, _COMPARED_WINDOWS)
    errors = hidden_state_errors(
        dense, {"pruned": pruned, "without_compensation": uncompensated}, compared, device=device
    )
    prompts = _spread(windows, _PROMPTS).input_ids
    return {
        "hidden_state_errors": {name: values.tolist() for name, values in errors.items()},
        "protocol": {"windows": len(compared), "length": compared.length},
        "generations": [
            _side_by_side(dense, pruned, window, tokenizer, device) for window in prompts if tokenizer is not None
        ],
    }


def _spread(windows: Samples, count: int) -> Samples:
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def _side_by_side(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    window: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> dict[str, Any]:
    half = len(window) // 2
    length, new_tokens = min(_PROMPT_TOKENS, half), min(_NEW_TOKENS, half)
    prompt = window[None, :length]
    with answering(dense, device), answering(pruned, device):
        dense_tokens, pruned_tokens = (
            generate(model, prompt.to(device), new_tokens)[0, length:].cpu() for model in (dense, pruned)
        )
    differing = (dense_tokens != pruned_tokens).nonzero()
    return {
        "prompt": tokenizer.decode(prompt[0]),
        "text": tokenizer.decode(window[length : length + new_tokens]),
        "dense": tokenizer.decode(dense_tokens),
        "pruned": tokenizer.decode(pruned_tokens),
        "new_tokens": new_tokens,
        "equal_tokens": int(differing[0]) if len(differing) else new_tokens,
    }
