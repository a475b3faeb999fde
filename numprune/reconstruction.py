"""How far a pruned model's hidden states are from the dense model's, block by block.

With h the dense model's hidden state of a token after a block and h' the pruned one's, the error is the mean over
tokens of ||h' - h||^2 / ||h||^2. Every token counts the same: a sum over tokens would follow the few whose hidden
states are a hundred times as large as all others'.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.architectures import after_blocks, decoder_blocks


@torch.no_grad()
def hidden_state_errors(
    dense: PreTrainedModel, pruned: Mapping[str, PreTrainedModel], input_ids: Tensor, *, batch_size: int = 1
) -> dict[str, Tensor]:
    """Compares the hidden states of pruned models with the dense model's on the same tokens.

    Errors add up on their way: that of a block is what all blocks up to it have left, not what it did itself.

    Args:
        dense: The dense model.
        pruned: Models made of it, by a name; on its device.
        input_ids: (samples, length) token ids.
        batch_size: Samples that are computed together; the hidden states of all blocks are held for them.

    Returns:
        (blocks + 1,) float64 by the model's name: the mean relative squared error after every block and, last, after
        the norm that follows them.

    Raises:
        NumpruneError: If the architecture is not supported.
    """
    sums = {name: torch.zeros(len(decoder_blocks(dense)) + 1, dtype=torch.float64) for name in pruned}
    for batch in input_ids.split(batch_size):
        expected = _hidden_states(dense, batch)
        for name, model in pruned.items():
            for index, (found, wanted) in enumerate(zip(_hidden_states(model, batch), expected, strict=True)):
                exact = wanted.double()
                error = (found.double() - exact).square().sum(dim=-1) / exact.square().sum(dim=-1)
                sums[name][index] += error.sum().cpu()
    return {name: total / input_ids.numel() for name, total in sums.items()}


def _hidden_states(model: PreTrainedModel, input_ids: Tensor) -> list[Tensor]:
    decoder: Any = model.get_decoder()
    with _outputs([*decoder_blocks(model), after_blocks(model)[0]]) as seen:
        decoder(input_ids=input_ids.to(model.device), use_cache=False)
    return seen


@contextmanager
def _outputs(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output)

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
