"""What can be pruned in a model: its decoder blocks and their prunable groups.

    producers (rows)                       consumer (columns)

    q_proj, k_proj, v_proj  ->  attention  ->  o_proj        unit: one key/value head and the query heads that share it
    gate_proj, up_proj      ->  gated MLP  ->  down_proj     unit: one channel

Scoring, thresholds, compensation and slicing see groups and nothing else. Sizes are read off the tensors, not off the
configuration, so that a model whose layers differ in size is described just as well.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from numprune.errors import NumpruneError
from numprune.ragged import FAMILIES

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Checkpoints written by numprune can be pruned once more.
_SUPPORTED = (*FAMILIES, *(config.model_type for config, _ in FAMILIES.values()))


@dataclass(frozen=True)
class Producer:
    """A linear layer whose output rows belong to the units of a group.

    Attributes:
        path: Of the layer inside its block.
        rows: Consecutive rows that one unit owns.
    """

    path: str
    rows: int


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
        unit_parameters: Parameters that go with one unit, biases included.
    """

    block: int
    kind: Kind
    consumer: str
    producers: tuple[Producer, ...]
    units: int
    channels: int
    width: int
    unit_parameters: int

    @property
    def name(self) -> str:
        """Unique within a model, such as `3.mlp`."""
        return f"{self.block}.{self.kind}"

    @property
    def parameters(self) -> int:
        """Parameters of all units."""
        return self.units * self.unit_parameters


def check_supported(config: PreTrainedConfig) -> None:
    """Raises NumpruneError if a model of this configuration cannot be pruned."""
    if config.model_type not in _SUPPORTED:
        raise NumpruneError(
            f"The architecture {config.model_type!r} is not supported. Supported are the dense decoder-only models of "
            f"the families {', '.join(FAMILIES)}."
        )


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a model, in order.

    Raises:
        NumpruneError: If the architecture is not supported.
    """
    check_supported(model.config)
    return model.get_decoder().layers


def prunable_groups(model: PreTrainedModel) -> list[list[PrunableGroup]]:
    """The prunable groups of every decoder block; modules that are absent are no groups.

    Raises:
        NumpruneError: If the architecture is not supported.
    """
    blocks: list[list[PrunableGroup]] = []
    for index, block in enumerate(decoder_blocks(model)):
        present = []
        if not _is_absent(block.get_submodule("self_attn")):
            present.append(_attention_group(index, block))
        if not _is_absent(block.get_submodule("mlp")):
            present.append(_mlp_group(index, block))
        blocks.append(present)
    return blocks


def all_groups(model: PreTrainedModel) -> list[PrunableGroup]:
    """The prunable groups of all decoder blocks, in order.

    Raises:
        NumpruneError: If the architecture is not supported.
    """
    return [group for groups in prunable_groups(model) for group in groups]


def layer_widths(model: PreTrainedModel) -> list[dict[str, int]]:
    """The widths of every decoder block under the names that transformers' configurations use; 0 where it is absent."""
    widths = []
    for block in decoder_blocks(model):
        attention: Any = block.get_submodule("self_attn")
        queries = keys = channels = 0
        if not _is_absent(attention):
            queries = linear(block, "self_attn.q_proj").out_features // attention.head_dim
            keys = linear(block, "self_attn.k_proj").out_features // attention.head_dim
        if not _is_absent(block.get_submodule("mlp")):
            channels = linear(block, "mlp.gate_proj").out_features
        widths.append({"num_attention_heads": queries, "num_key_value_heads": keys, "intermediate_size": channels})
    return widths


def head_dim(model: PreTrainedModel) -> int:
    """Channels of one attention head; an absent attention knows them too."""
    attention: Any = decoder_blocks(model)[0].get_submodule("self_attn")
    return int(attention.head_dim)


def linear(block: nn.Module, path: str) -> nn.Linear:
    """The linear layer at a path inside a block.

    Raises:
        NumpruneError: If another kind of module stands there, such as a quantized layer.
    """
    module = block.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise NumpruneError(
            f"{path} is a {type(module).__name__}, not a plain nn.Linear: prune the unquantized model, then quantize."
        )
    return module


def _is_absent(module: nn.Module) -> bool:
    # By attribute: a model loaded with the file that its checkpoint brings has classes of that file.
    return getattr(module, "is_absent", False)


def _attention_group(index: int, block: nn.Module) -> PrunableGroup:
    attention: Any = block.get_submodule("self_attn")
    per_key = attention.head_dim
    per_group = per_key * attention.num_key_value_groups
    producers = (
        Producer("self_attn.q_proj", per_group),
        Producer("self_attn.k_proj", per_key),
        Producer("self_attn.v_proj", per_key),
    )
    heads = attention.num_key_value_groups
    return _group(index, "attention", block, "self_attn.o_proj", channels=per_group, width=heads, producers=producers)


def _mlp_group(index: int, block: nn.Module) -> PrunableGroup:
    producers = (Producer("mlp.gate_proj", 1), Producer("mlp.up_proj", 1))
    return _group(index, "mlp", block, "mlp.down_proj", channels=1, width=1, producers=producers)


def _group(
    index: int,
    kind: Kind,
    block: nn.Module,
    consumer: str,
    *,
    channels: int,
    width: int,
    producers: tuple[Producer, ...],
) -> PrunableGroup:
    output = linear(block, consumer)
    unit_parameters = output.out_features * channels
    for producer in producers:
        layer = linear(block, producer.path)
        unit_parameters += producer.rows * (layer.in_features + (layer.bias is not None))
    units = output.in_features // channels
    return PrunableGroup(index, kind, consumer, producers, units, channels, width, unit_parameters)
