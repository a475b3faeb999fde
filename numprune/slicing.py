"""Cutting units out of a model: rows of the producers, columns of the consumer. Tensors shrink; nothing is masked."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from numprune.architectures import PrunableGroup, linear
from numprune.compensation import compensate
from numprune.statistics import Moments


@torch.no_grad()
def slice_block(
    block: nn.Module,
    groups: Sequence[PrunableGroup],
    kept: Mapping[str, Tensor],
    moments: Mapping[str, Moments] | None = None,
    damping: float = 0.0,
) -> None:
    """Removes all units that are not kept from one decoder block, in place.

    Args:
        block: The decoder block.
        groups: Its prunable groups.
        kept: Indices of the units that stay, by the group's name.
        moments: Of the consumers' inputs, by the group's name; with them the kept columns are compensated.
        damping: Of the compensation.
    """
    for group in groups:
        units = kept[group.name]
        for producer in group.producers:
            rows = channel_indices(units, producer.rows)
            layer = linear(block, producer.path)
            bias = None if layer.bias is None else layer.bias[rows]
            _replace(layer, layer.weight[rows], bias)
        consumer = linear(block, group.consumer)
        columns = channel_indices(units, group.channels)
        if moments is None:
            weight = consumer.weight[:, columns]
        else:
            gram = moments[group.name].gram
            weight = compensate(gram, consumer.weight, columns, damping, subject=f"G_KK of {group.name}")
        _replace(consumer, weight, consumer.bias)


def channel_indices(units: Tensor, channels: int) -> Tensor:
    """Indices of all channels of the given units, each of which owns `channels` consecutive ones."""
    return (units[:, None] * channels + torch.arange(channels, device=units.device)).flatten()


def _replace(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=layer.weight.requires_grad)
    layer.out_features, layer.in_features = weight.shape
