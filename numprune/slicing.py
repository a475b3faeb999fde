"""Cutting units out of a model: rows of the producers, columns of the consumer. Tensors shrink; nothing is masked."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from numprune.architectures import PrunableGroup, channel_indices, linear
from numprune.compensation import bias_compensation, compensate
from numprune.ragged import cut_norm, norm_entries, remove_attention, remove_mlp, set_head_counts
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
            rows = group.rows(producer, units)
            layer = linear(block, producer.path)
            bias = None if layer.bias is None else layer.bias[rows]
            _replace(layer, layer.weight[rows], bias)
        for path in group.norms:
            entries = norm_entries(block.get_submodule(path)) // group.units
            cut_norm(block, path, channel_indices(units, entries))
        consumer = linear(block, group.consumer)
        columns = group.columns(units)
        weight = consumer.weight[:, columns]
        if moments is not None and compensation == "bias":
            add_bias(consumer, bias_compensation(moments[group.name].mean, consumer.weight, columns))
        elif moments is not None and compensation == "least_squares":
            measured = moments[group.name]
            subject = f"G_KK of {group.name}"
            weight = compensate(measured.gram, consumer.weight, columns, measured.damping(damping), subject=subject)
        _replace(consumer, weight, consumer.bias)
        if group.kind == "attention":
            set_head_counts(block.get_submodule(group.module), len(units) * group.width, len(units))


@torch.no_grad()
def add_bias(layer: nn.Linear, bias: Tensor) -> None:
    """Adds a bias of (D_out,) to a layer's own, or gives it one."""
    if layer.bias is not None:
        bias = layer.bias + bias
    layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)


def _remove_module(block: nn.Module, group: PrunableGroup) -> None:
    if group.kind == "attention":
        remove_attention(block, group.module, group.channels // group.width)
    else:
        remove_mlp(block, group.consumer, [producer.path for producer in group.producers])


def _replace(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=layer.weight.requires_grad)
    layer.out_features, layer.in_features = weight.shape
