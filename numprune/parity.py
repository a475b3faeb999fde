"""Whether a family is described rightly: what must be the same in a model with units at zero and in one without them.

The reference is the family's own dense model, in which the consumers' columns of the units that go are zero. A norm
whose mean square runs over the channels of all heads needs more. With K the channels that stay of D and no queries or
keys from the others, the dense model gives

    w q / sqrt(sum_K q^2 / D + eps),

and the sliced one takes its mean over K alone. They are the same if the dense model's weight is w sqrt(|K| / D) and its
eps is eps |K| / D.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.architectures import PrunableGroup, decoder_blocks, linear, prunable_groups
from numprune.slicing import slice_block


@torch.no_grad()
def slice_units(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> None:
    """Removes all units that are not kept from a model, in place; nothing makes up for them."""
    for block, groups in zip(decoder_blocks(model), prunable_groups(model), strict=True):
        slice_block(block, groups, kept)


@torch.no_grad()
def zero_units(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> None:
    """Makes a dense model compute, in place, what it computes without the units that are not kept; shapes stay.

    Args:
        model: A dense model whose parameters are its own.
        kept: Indices of the units that stay, by the group's name.
    """
    for block, groups in zip(decoder_blocks(model), prunable_groups(model), strict=True):
        for group in groups:
            units = kept[group.name]
            gone = torch.tensor(sorted(set(range(group.units)) - set(units.tolist())), dtype=torch.long)
            consumer = linear(block, group.consumer)
            consumer.weight[:, group.columns(gone)] = 0
            if not len(units) and consumer.bias is not None:
                consumer.bias.zero_()
            if group.joint_norms and len(units):
                _silence(block, group, gone)


def _silence(block: nn.Module, group: PrunableGroup, gone: Tensor) -> None:
    for producer in group.producers:
        layer, rows = linear(block, producer.path), group.rows(producer, gone)
        layer.weight[rows] = 0
        if layer.bias is not None:
            layer.bias[rows] = 0
    share = 1 - len(gone) / group.units
    for path in group.joint_norms:
        norm: Any = block.get_submodule(path)
        norm.weight *= math.sqrt(share)
        norm.variance_epsilon *= share
