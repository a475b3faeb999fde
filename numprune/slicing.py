"""Cutting units out of a model: rows of the producers, columns of the consumer. Tensors shrink; nothing is masked."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from numprune.architectures import PrunableGroup, linear
from numprune.compensation import bias_compensation, compensate
from numprune.ragged import AbsentAttention, AbsentMLP
from numprune.statistics import Damping, Moments

Compensation = Literal["none", "bias", "least_squares"]


@torch.no_grad()
def slice_block(
    block: nn.Module,
    groups: Sequence[PrunableGroup],
    kept: Mapping[str, Tensor],
    *,
    compensation: Compensation = "none",
    moments: Mapping[str, Moments] | None = None,
    damping: Damping = 0.0,
) -> None:
    """Removes all units that are not kept from one decoder block, in place.

    A group of which nothing is kept loses its module, norms aside; nothing compensates for that.

    Args:
        block: The decoder block.
        groups: Its prunable groups.
        kept: Indices of the units that stay, by the group's name.
        compensation: What the consumers do for the pruned units: `none`; `bias`, they add what those give on average;
            `least_squares`, the kept columns take over what they can.
        moments: Of the consumers' inputs, by the group's name; needed unless `compensation` is `none`.
        damping: Of `least_squares`.

    Raises:
        ValueError: If moments are needed and None.
    """
    if compensation != "none" and moments is None:
        raise ValueError(f"compensation {compensation!r} needs moments, got None")
    for group in groups:
        units = kept[group.name]
        if not len(units):
            _remove_module(block, group)
            continue
        for producer in group.producers:
            rows = channel_indices(units, producer.rows)
            layer = linear(block, producer.path)
            bias = None if layer.bias is None else layer.bias[rows]
            _replace(layer, layer.weight[rows], bias)
        consumer = linear(block, group.consumer)
        columns = channel_indices(units, group.channels)
        weight = consumer.weight[:, columns]
        if moments is not None and compensation == "bias":
            add_bias(consumer, bias_compensation(moments[group.name].mean, consumer.weight, columns))
        elif moments is not None and compensation == "least_squares":
            measured = moments[group.name]
            subject = f"G_KK of {group.name}"
            weight = compensate(measured.gram, consumer.weight, columns, measured.damping(damping), subject=subject)
        _replace(consumer, weight, consumer.bias)


@torch.no_grad()
def add_bias(layer: nn.Linear, bias: Tensor) -> None:
    """Adds a bias of (D_out,) to a layer's own, or gives it one."""
    if layer.bias is not None:
        bias = layer.bias + bias
    layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)


def channel_indices(units: Tensor, channels: int) -> Tensor:
    """Indices of all channels of the given units, each of which owns `channels` consecutive ones."""
    return (units[:, None] * channels + torch.arange(channels, device=units.device)).flatten()


def _remove_module(block: nn.Module, group: PrunableGroup) -> None:
    path = group.consumer.rpartition(".")[0]
    if group.kind == "attention":
        attention: Any = block.get_submodule(path)
        block.set_submodule(path, AbsentAttention(attention.layer_idx, attention.head_dim))
    else:
        block.set_submodule(path, AbsentMLP())


def _replace(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=layer.weight.requires_grad)
    layer.out_features, layer.in_features = weight.shape
