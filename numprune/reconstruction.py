"""How far a pruned model's hidden states are from the dense model's, block by block.

With h the dense model's hidden state of a token after a block and h' the pruned one's, the error is the mean over
tokens of ||h' - h||^2 / ||h||^2. Every token counts the same: a sum over tokens would follow the few whose hidden
states are a hundred times as large as all others'.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.architectures import after_blocks, decoder_blocks
from numprune.batches import fitting_batch
from numprune.capture import enter
from numprune.samples import Samples
from numprune.streaming import outside_to, visit


@torch.no_grad()
def hidden_state_errors(
    dense: PreTrainedModel,
    pruned: Mapping[str, PreTrainedModel],
    samples: Samples | Tensor,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Compares the hidden states of pruned models with the dense model's on the same samples.

    Errors add up on their way: that of a block is what all blocks up to it have left, not what it did itself.

    Args:
        dense: The dense model.
        pruned: Models made of it, by a name.
        samples: To compare on, or their (samples, length) token ids.
        batch_size: Samples that go through a block together, by default `fitting_batch`.
        device: Where to compute; by default where the dense model is.

    Returns:
        (blocks + 1,) float64 by the model's name: the mean relative squared error after every block and, last, after
        the norm that follows them.

    Raises:
        NumpruneError: If the architecture is not supported.
    """
    samples, place = Samples.of(samples), torch.device(device or dense.device)
    models: dict[str | None, PreTrainedModel] = {None: dense} | dict(pruned.items())
    for model in models.values():
        outside_to(model, place)
    norms = {name: after_blocks(model)[0] for name, model in models.items()}
    batch_size = batch_size or fitting_batch(dense, samples.length, place)
    entered = {name: enter(model, samples, batch_size, place) for name, model in models.items()}
    sums = {name: torch.zeros(len(decoder_blocks(dense)) + 1, dtype=torch.float64, device=place) for name in pruned}
    # All models side by side, so that the hidden states of one block at a time are held.
    for together in zip(*(visit(decoder_blocks(model), place) for model in models.values()), strict=True):
        for (index, block), (hidden, arguments) in zip(together, entered.values(), strict=True):
            for batch, after in enumerate(arguments.through(index, block, hidden)):
                hidden[batch] = after
        for name in pruned:
            sums[name][index] = _error(entered[name][0], entered[None][0], samples, batch_size)
    for name in pruned:
        found, expected = (map(norms[key], entered[key][0]) for key in (name, None))
        sums[name][-1] = _error(found, expected, samples, batch_size)
    return {name: total.cpu() / int(samples.present().sum()) for name, total in sums.items()}


def _error(found: Iterable[Tensor], expected: Iterable[Tensor], samples: Samples, batch_size: int) -> Tensor:
    """The relative squared error, summed over tokens that are no padding."""
    errors = []
    for ours, wanted, batch in zip(found, expected, samples.split(batch_size), strict=True):
        exact, present = wanted.double(), batch.present().to(wanted.device)
        relative = (ours.double() - exact).square().sum(dim=-1) / exact.square().sum(dim=-1)
        errors.append(relative[present].sum())
    return torch.stack(errors).sum()
