"""What can be pruned in a model: its decoder blocks and their prunable groups.

    producers (rows)                       consumer (columns)

    q_proj, k_proj, v_proj  ->  attention  ->  o_proj        unit: one key/value head and the query heads that share it
    gate_proj, up_proj      ->  gated MLP  ->  down_proj     unit: one channel

Scoring, thresholds, compensation and slicing see groups and nothing else. What these projections are called in a family
and how they are laid out is said by its `numprune.ragged.Layout`. Sizes are read off the tensors, not off the
configuration, so that a model whose layers differ in size is described just as well.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from numprune.errors import NumpruneError
from numprune.ragged import LAYOUTS, Layout, Projections, module_path, present_norms, row_counts

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Producer:
    """A linear layer whose output rows belong to the units of a group.

    Attributes:
        path: Of the layer inside its block.
        rows: Consecutive rows that one unit owns; of a fused projection, in each of the parts that follow each other.
    """

    path: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class PrunableGroup:
    """One output projection, the projections that feed it, and the units they are cut by.

    Attributes:
        block: Index of the decoder block.
        kind: What a unit is: a head or key/value group (`attention`) or a channel (`mlp`).
        consumer: Path of the output projection inside the block.
        producers: The projections whose rows feed it.
        units: How many units the group has.
        channels: Consecutive input channels of the consumer that one unit owns.
        width: What one unit adds to the layer's width as configurations count it: query heads, or channels.
        unit_parameters: Parameters that go with one unit, biases and norms included.
        norms: Paths of the norms of which each unit owns an equal share of consecutive entries.
        joint_norms: Those of them whose mean square runs over the channels of all units.
        post_norm: Path of the norm between the consumer and the residual stream, if there is one.
    """

    block: int
    kind: Kind
    consumer: str
    producers: tuple[Producer, ...]
    units: int
    channels: int
    width: int
    unit_parameters: int
    norms: tuple[str, ...] = ()
    joint_norms: tuple[str, ...] = ()
    post_norm: str | None = None

    @property
    def name(self) -> str:
        """Unique within a model, such as `3.mlp`."""
        return f"{self.block}.{self.kind}"

    @property
    def module(self) -> str:
        """Path of the module that holds the consumer; empty if that is the block."""
        return module_path(self.consumer)

    @property
    def parameters(self) -> int:
        """Parameters of all units."""
        return self.units * self.unit_parameters

    def columns(self, units: Tensor) -> Tensor:
        """Columns of the consumer that belong to the given units."""
        return channel_indices(units, self.channels)

    def rows(self, producer: Producer, units: Tensor) -> Tensor:
        """Rows of a producer that belong to the given units."""
        parts, start = [], 0
        for count in producer.rows:
            parts.append(start + channel_indices(units, count))
            start += self.units * count
        return torch.cat(parts)


def channel_indices(units: Tensor, channels: int) -> Tensor:
    """Indices of all channels of the given units, each of which owns `channels` consecutive ones."""
    return (units[:, None] * channels + torch.arange(channels, device=units.device)).flatten()


def check_supported(config: PreTrainedConfig) -> None:
    """Raises NumpruneError if a model of this configuration cannot be pruned."""
    layout_of(config)


def layout_of(config: PreTrainedConfig) -> Layout:
    """Where a family has its projections. Checkpoints written by numprune can be pruned once more.

    Raises:
        NumpruneError: If a model of this configuration cannot be pruned.
    """
    layout = LAYOUTS.get(config.model_type.removeprefix("ragged_"))
    if layout is None:
        raise NumpruneError(
            f"The architecture {config.model_type!r} is not supported. Supported are the dense decoder-only models of "
            f"the families {', '.join(LAYOUTS)}; docs/architectures.md says how to add one."
        )
    for name, value in layout.requires.items():
        if getattr(config, name) != value:
            raise NumpruneError(
                f"A model of the family {config.model_type} with {name}={getattr(config, name)} is not supported: "
                f"numprune needs {name}={value}. See docs/architectures.md."
            )
    return layout


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a model, in order.

    Raises:
        NumpruneError: If the architecture is not supported.
    """
    layout_of(model.config)
    return model.get_decoder().layers


def after_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """What the decoder has behind its last block, in order, the norm first.

    Raises:
        NumpruneError: If the architecture is not supported.
    """
    decoder = model.get_decoder()
    modules = (getattr(decoder, name) for name in layout_of(model.config).final)
    return [module for module in modules if module is not None]


def decoder_output(model: PreTrainedModel, states: Tensor) -> Tensor:
    """What the decoder makes of the hidden states after its last block."""
    for module in after_blocks(model):
        states = module(states)
    return states


@torch.no_grad()
def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """What a model makes of the output of its decoder, as in its own forward pass: scale and soft cap included.

    Args:
        model: A causal language model.
        hidden: (samples, length, D) output of the decoder.

    Returns:
        (samples, length, vocabulary)
    """
    decoder: Any = model.get_decoder()
    decoder.forward = lambda *_arguments, **_options: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        scores: Tensor = model(inputs_embeds=hidden, use_cache=False).logits
    finally:
        del decoder.forward  # What the class has shows again.
    return scores


def prunable_groups(model: PreTrainedModel) -> list[list[PrunableGroup]]:
    """The prunable groups of every decoder block; modules that are absent are no groups.

    Raises:
        NumpruneError: If the architecture is not supported.
    """
    layout = layout_of(model.config)
    blocks: list[list[PrunableGroup]] = []
    for index, block in enumerate(decoder_blocks(model)):
        present = []
        if not _is_absent(block, layout.attention):
            present.append(_attention_group(index, block, layout))
        if not _is_absent(block, layout.mlp):
            present.append(_group(index, "mlp", block, layout.mlp, sizes={"gate": 1, "up": 1}, channels=1, width=1))
        blocks.append(present)
    return blocks


def all_groups(model: PreTrainedModel) -> list[PrunableGroup]:
    """The prunable groups of all decoder blocks, in order.

    Raises:
        NumpruneError: If the architecture is not supported.
    """
    return [group for groups in prunable_groups(model) for group in groups]


def layer_widths(model: PreTrainedModel) -> list[dict[str, int]]:
    """The widths of every decoder block under the names that ragged configurations use; 0 where it is absent."""
    widths = []
    for groups in prunable_groups(model):
        present = {group.kind: group for group in groups}
        attention, mlp = present.get("attention"), present.get("mlp")
        widths.append(
            {
                "num_attention_heads": attention.units * attention.width if attention else 0,
                "num_key_value_heads": attention.units if attention else 0,
                "intermediate_size": mlp.units if mlp else 0,
            }
        )
    return widths


def attention_module(model: PreTrainedModel, block: int) -> Any:
    """The attention of a block, or what stands where it was."""
    return decoder_blocks(model)[block].get_submodule(module_path(layout_of(model.config).attention.consumer))


def head_dim(model: PreTrainedModel) -> int:
    """Channels of one attention head; an absent attention knows them too."""
    return _head_dim(attention_module(model, 0), layout_of(model.config))


def linear(block: nn.Module, path: str) -> nn.Linear:
    """The linear layer at a path inside a block.

    Raises:
        NumpruneError: If there is none, or another kind of module stands there, such as a quantized layer.
    """
    module = _submodule(block, path)
    if not isinstance(module, nn.Linear):
        raise NumpruneError(
            f"{path} is a {type(module).__name__}, not a plain nn.Linear: prune the unquantized model, then quantize."
        )
    return module


def _submodule(block: nn.Module, path: str) -> Any:
    try:
        return block.get_submodule(path)
    except AttributeError:
        raise NumpruneError(
            f"A {type(block).__name__} has no {path}: its family's layout is not right, see docs/architectures.md."
        ) from None


def _is_absent(block: nn.Module, projections: Projections) -> bool:
    module = _submodule(block, module_path(projections.consumer) or projections.consumer)
    # By attribute: a model loaded with the file that its checkpoint brings has classes of that file.
    return getattr(module, "is_absent", False)


def _head_dim(attention: Any, layout: Layout) -> int:
    name = "head_dim" if getattr(attention, "is_absent", False) else layout.head_dim
    if not hasattr(attention, name):
        raise NumpruneError(
            f"A {type(attention).__name__} has no {name}: its family's layout is not right, see docs/architectures.md."
        )
    return int(getattr(attention, name))


def _attention_group(index: int, block: nn.Module, layout: Layout) -> PrunableGroup:
    attention: Any = block.get_submodule(module_path(layout.attention.consumer))
    per_key = _head_dim(attention, layout)
    heads = getattr(attention, "num_key_value_groups", 1)  # Multi-head attention need not have it.
    sizes = {"q": per_key * heads, "k": per_key, "v": per_key}
    return _group(index, "attention", block, layout.attention, sizes=sizes, channels=sizes["q"], width=heads)


def _group(
    index: int,
    kind: Kind,
    block: nn.Module,
    projections: Projections,
    *,
    sizes: dict[str, int],
    channels: int,
    width: int,
) -> PrunableGroup:
    output = linear(block, projections.consumer)
    units = output.in_features // channels
    producers = tuple(Producer(path, row_counts(rows, sizes)) for path, rows in projections.producers.items())
    unit_parameters = output.out_features * channels
    for producer in producers:
        layer = linear(block, producer.path)
        unit_parameters += sum(producer.rows) * (layer.in_features + (layer.bias is not None))
    norms = present_norms(block, projections)
    for path in norms:
        unit_parameters += sum(parameter.numel() for parameter in block.get_submodule(path).parameters()) // units
    return PrunableGroup(
        block=index,
        kind=kind,
        consumer=projections.consumer,
        producers=producers,
        units=units,
        channels=channels,
        width=width,
        unit_parameters=unit_parameters,
        norms=norms,
        joint_norms=projections.joint_norms,
        post_norm=projections.post_norm,
    )
