"""Targets in the user's terms: what a pruned model may cost, what its units cost, and how much of that must go."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, ROUND_UP, Decimal
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from numprune.architectures import PrunableGroup, all_groups, attention_module, decoder_blocks, head_dim, linear
from numprune.errors import NumpruneError

BudgetKind = Literal["ratio", "parameters", "size", "memory", "flops", "latency"]

_COUNTS = {"": "1", "k": "1e3", "M": "1e6", "G": "1e9", "T": "1e12"}
_BYTES = {"B": "1", "kB": "1e3", "MB": "1e6", "GB": "1e9", "TB": "1e12"}
_SECONDS = {"us": "1e-6", "ms": "1e-3", "s": "1"}
# Powers of ten, ascending: what is written back has one of these.
_WRITTEN = {
    "ratio": {"": "1"},
    "parameters": _COUNTS,
    "size": _BYTES,
    "memory": _BYTES,
    "flops": _COUNTS,
    "latency": _SECONDS,
}
_BINARY = {"KiB": str(2**10), "MiB": str(2**20), "GiB": str(2**30), "TiB": str(2**40)}
_READ = _WRITTEN | dict.fromkeys(("size", "memory"), _BYTES | _BINARY)
# Of a safetensors header: its length, its own metadata and its padding.
_HEADER_ALIGNMENT = 64
_FORM = re.compile(r"(?:(?P<kind>[a-z]+)-)?(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[A-Za-z]*)")


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost at most; for a ratio, what goes.

    Attributes:
        kind: What `value` counts.

            - `ratio`: share of the units' parameters that goes, in (0, 1).
            - `parameters`: of the whole model, tied ones once.
            - `size`: bytes of the checkpoint's safetensors, tied weights once.
            - `memory`: bytes of the weights and of the key/value cache of `batch` sequences of `length` tokens.
            - `flops`: floating-point operations to process one token that attends to `length` tokens, itself included.
            - `latency`: seconds per generated token for `batch` prompts of `length` tokens, measured; the time that
              the prompts take is spread over the tokens.
        value: In the unit of the kind; positive.
        batch: Sequences at a time; at least 1.
        length: Tokens of the context; at least 1.
    """

    kind: BudgetKind
    value: float
    batch: int = 1
    length: int = 2048

    def __post_init__(self) -> None:
        if self.kind not in get_args(BudgetKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(BudgetKind))}, got {self.kind!r}")
        highest = 1 if self.kind == "ratio" else math.inf
        if not 0 < self.value < highest:
            raise NumpruneError(f"A budget's {self.kind} must be in (0, {highest}), got {self.value}.")
        if self.batch < 1 or self.length < 1:
            raise NumpruneError(
                f"A budget's batch and length must be at least 1, got batch {self.batch} and length {self.length}."
            )

    def __str__(self) -> str:
        """The text that `parse_budget` reads back to the same kind and value."""
        number, unit = _scaled(Decimal(str(self.value)), self.kind)
        return number if self.kind == "ratio" else f"{self.kind}-{number}{unit}"


@dataclass(frozen=True)
class Costs:
    """What a model costs by the units it keeps, in the unit of a budget.

    Attributes:
        fixed: Cost of what is never pruned.
        unit: Cost of one unit, by the group's name.
    """

    fixed: float
    unit: Mapping[str, float]

    def total(self, kept: Mapping[str, int]) -> float:
        """Cost of a model with this many units in every group."""
        return self.fixed + sum(kept[name] * cost for name, cost in self.unit.items())


def parse_budget(text: str, *, batch: int = 1, length: int = 2048) -> Budget:
    """Reads a budget from the form it has in configuration files and folder names.

    Args:
        text: A bare number is a ratio; otherwise the kind, a hyphen, a number and its unit, such as `size-8MB`.
        batch: See `Budget`.
        length: See `Budget`.

    Raises:
        NumpruneError: If the text has another form, kind or unit, or a value is out of range.
    """
    match = _FORM.fullmatch(text)
    if not match or match["kind"] == "ratio" or (match["kind"] or "ratio") not in _READ:
        raise NumpruneError(
            f"{text!r} is no budget: write 0.2 for a ratio, or for example parameters-4M, size-8MB, memory-2GB, "
            "flops-6G, latency-5ms."
        )
    kind: Any = match["kind"] or "ratio"
    units = _READ[kind]
    if match["unit"] not in units:
        allowed = ", ".join(unit or "no unit" for unit in units)
        raise NumpruneError(f"{text!r} has the unit {match['unit'] or 'none'!r}; {kind} takes {allowed}.")
    return Budget(kind, float(Decimal(match["number"]) * Decimal(units[match["unit"]])), batch, length)


def readable(value: float, kind: BudgetKind, rounding: str = ROUND_HALF_EVEN) -> str:
    """A cost for people, to three digits: 8.7 MB, 4.33 M, 5.1 ms.

    Args:
        value: In the unit of the kind.
        kind: What is counted.
        rounding: A mode of `decimal`; for limits that must hold as printed.
    """
    exact = Decimal(str(value))
    number, unit = _scaled(exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), rounding), kind)
    return f"{number} {unit}".rstrip()


def linear_costs(model: PreTrainedModel, budget: Budget) -> Costs:
    """What is fixed and what one unit of every group costs, counted from the tensors' shapes.

    Bytes are those of the model's data type: the checkpoint's, if the model is from `checkpoint.load_shapes`. A matrix
    costs two operations per weight and token; the embedding lookup, norms, biases and rotations cost none. A query head
    costs 4 * tokens * head_dim operations: its scores, and the sum of the values that they weigh. A layer with a
    sliding window sees and stores no more tokens than the window.

    Args:
        model: A dense model; the meta device will do.
        budget: Of any kind but `latency`, which is measured.

    Raises:
        ValueError: If the budget is a latency.
        NumpruneError: If the architecture is not supported.
    """
    if budget.kind == "latency":
        raise ValueError("budget must not be of the kind latency, which is measured: see numprune.latency")
    groups = all_groups(model)
    unit = {group.name: _unit_cost(model, group, budget) for group in groups}
    if budget.kind == "ratio":
        return Costs(0, unit)
    if budget.kind == "flops":
        head: Any = model.get_output_embeddings()
        return Costs(2 * head.weight.numel(), unit)
    fixed = sum(parameter.numel() for parameter in model.parameters()) - sum(group.parameters for group in groups)
    if budget.kind == "parameters":
        return Costs(fixed, unit)
    header = _header_bytes(model) if budget.kind == "size" else 0
    return Costs(fixed * model.dtype.itemsize + header, unit)


def to_remove(model: PreTrainedModel, budget: Budget, *, minimum: int = 1) -> tuple[Costs, float]:
    """What the parts of a model cost, and how much of it must go.

    Args:
        model: A dense model; the meta device will do.
        budget: Of any kind but `latency`.
        minimum: Units that every group keeps.

    Raises:
        ValueError: If the budget is a latency.
        NumpruneError: If the dense model is within the budget, or no pruned one can be.
    """
    costs = linear_costs(model, budget)
    units = {group.name: group.units for group in all_groups(model)}
    dense = costs.total(units)
    least = costs.total({name: min(minimum, count) for name, count in units.items()})
    kept = f"with {minimum} unit{'s' * (minimum != 1)} kept in every group"
    if budget.kind == "ratio":
        if budget.value * dense > dense - least:
            most = readable(1 - least / dense, "ratio", ROUND_DOWN)
            raise NumpruneError(f"ratio {budget} cannot be reached: {kept} at most {most} can go. Lower it.")
        return costs, budget.value * dense
    amount = amount_over(dense, budget)
    if least > budget.value:
        lowest = readable(least, budget.kind, ROUND_UP)
        raise NumpruneError(f"{budget} cannot be met: {kept} the least possible is {lowest}. Raise it.")
    return costs, amount


def amount_over(dense: float, budget: Budget) -> float:
    """By how much a dense model's cost exceeds the budget.

    Raises:
        NumpruneError: If it does not.
    """
    if dense <= budget.value:
        spare = readable(budget.value - dense, budget.kind)
        raise NumpruneError(
            f"{budget} is met without pruning: the dense model comes to {readable(dense, budget.kind)}, {spare} below. "
            "Lower it."
        )
    return dense - budget.value


def _unit_cost(model: PreTrainedModel, group: PrunableGroup, budget: Budget) -> float:
    attended = _attended_tokens(model, group.block, budget.length) if group.kind == "attention" else 0
    if budget.kind == "flops":
        block = decoder_blocks(model)[group.block]
        weights = linear(block, group.consumer).out_features * group.channels
        weights += sum(sum(producer.rows) * linear(block, producer.path).in_features for producer in group.producers)
        return 2 * weights + 4 * attended * group.channels
    if budget.kind == "memory":
        cached = 2 * head_dim(model) * attended * budget.batch
        return (group.unit_parameters + cached) * model.dtype.itemsize
    if budget.kind == "size":
        return group.unit_parameters * model.dtype.itemsize
    return group.unit_parameters


def _header_bytes(model: PreTrainedModel) -> int:
    """At most so many bytes of a safetensors file say where its tensors lie; smaller tensors take fewer digits."""
    places = '"":{"dtype":"BF16","shape":[],"data_offsets":[,]},'
    digits = 2 * len(str(model.num_parameters() * model.dtype.itemsize))
    shapes = {name: ",".join(map(str, parameter.shape)) for name, parameter in model.named_parameters()}
    return sum(len(name) + len(shape) + len(places) + digits for name, shape in shapes.items()) + _HEADER_ALIGNMENT


def _attended_tokens(model: PreTrainedModel, block: int, length: int) -> int:
    # Some families decide layer by layer and say so on the layer, others have one window for all in the configuration.
    of_all = getattr(model.config, "sliding_window", None)
    window = getattr(attention_module(model, block), "sliding_window", of_all)
    return length if window is None else min(length, int(window))


def _scaled(value: Decimal, kind: BudgetKind) -> tuple[str, str]:
    """The digits of a value in the largest unit that is not larger than it, and that unit."""
    scales = {unit: Decimal(scale) for unit, scale in _WRITTEN[kind].items()}
    smallest = next(iter(scales))
    unit = next((unit for unit in reversed(scales) if scales[unit] <= abs(value)), smallest)
    return f"{(value / scales[unit]).normalize():f}", unit
