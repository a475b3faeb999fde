"""Pruned models in the classes that transformers ships: an ordinary checkpoint where all layers have the same widths.

Some configurations refuse head counts that do not divide the hidden size, though `head_dim` is given. Another family of
the library may compute the same and accept them; the model is then saved as one of that family.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from numprune.allocation import Shapes
from numprune.architectures import PrunableGroup, all_groups, decoder_blocks, head_dim, layer_widths
from numprune.ragged import LAYOUTS

# Families that compute the same, and the settings under which they do. Tensors have the same names and shapes.
_SISTERS: Mapping[str, tuple[str, dict[str, Any]]] = {"llama": ("mistral", {"sliding_window": None})}

_NO_PLACE = "the stock class has no place for its biases or for its number of heads"


@dataclass(frozen=True)
class Form:
    """A model in the class it is saved in.

    Attributes:
        model: With the tensors of the pruned one, to be saved: what no checkpoint holds stays on the meta device. None
            if no stock class fits.
        reason: Why this class, or why none; one sentence.
    """

    model: PreTrainedModel | None
    reason: str


def family(config: PreTrainedConfig) -> str:
    """The model type of the dense family."""
    return config.model_type.removeprefix("ragged_")


def as_stock(model: PreTrainedModel) -> Form:
    """The same tensors in a stock class, if there is one that gives the same logits."""
    if not _has_stock_class(model):
        return Form(None, f"transformers has no class of the family {family(model.config)}")
    widths = layer_widths(model)
    if any(0 in layer.values() for layer in widths):
        return Form(None, "whole modules are gone, which no stock class knows")
    if any(layer != widths[0] for layer in widths):
        return Form(None, "the layers differ in width, which no stock class knows")
    own, *sisters = _candidates(model, widths[0])
    try:
        stock = _with_tensors_of(model, own)
        return Form(stock, _why_stock(model) if stock else _NO_PLACE)
    except _REFUSALS as error:
        refusal = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ").rstrip(".")
    for candidate in sisters:
        sister = _with_tensors_of(model, candidate)
        if sister:
            listed = ", ".join(f"{key} {value}" for key, value in candidate.changes.items())
            return Form(
                sister,
                f"{own.name}'s stock configuration refuses the head count ({refusal}), and {candidate.name} with "
                f"{listed} computes the same",
            )
    return Form(None, f"the stock configuration refuses the head count ({refusal})")


@dataclass(frozen=True)
class StockShapes(Shapes):
    """Widths that are those of a stock class if they are the same in all layers.

    Attributes:
        head_counts: The query heads that a layer may keep; all may stay, and none where whole modules may go.
    """

    head_counts: frozenset[int] = frozenset()

    def removable(self, group: PrunableGroup) -> list[int]:
        """How many of a group's units may go, ascending from none."""
        counts = super().removable(group)
        if group.kind != "attention":
            return counts
        return [n for n in counts if n in {0, group.units} or (group.units - n) * group.width in self.head_counts]


def within_stock(shapes: Shapes, model: PreTrainedModel) -> Shapes:
    """The same shapes; if they are uniform, without the head counts that no stock class of the model's family takes."""
    if not shapes.uniform or not _has_stock_class(model):
        return shapes
    return StockShapes(**vars(shapes), head_counts=head_counts(model))


def head_counts(model: PreTrainedModel) -> frozenset[int]:
    """The query heads, the same in all layers, with which a model is one of a stock class."""
    group = next((group for group in all_groups(model) if group.kind == "attention"), None)
    if group is None:
        return frozenset()
    counts = range(group.width, _dense_heads(model) + 1, group.width)
    return frozenset(count for count in counts if _takes_heads(model, count, count // group.width))


# Of the configuration, or of the attention's constructor.
_REFUSALS = (StrictDataclassError, ValueError)


@dataclass(frozen=True)
class _Candidate:
    """A family that a model may be saved as, with all settings, and those of them that are not the model's own."""

    name: str
    settings: Mapping[str, Any]
    changes: Mapping[str, Any]

    def build(self, **settings: Any) -> PreTrainedModel:
        """On the meta device. Raises one of _REFUSALS."""
        stock_class: Any = LAYOUTS[self.name].stock
        with torch.device("meta"):
            return stock_class(stock_class.config_class(**dict(self.settings) | settings))


def _has_stock_class(model: PreTrainedModel) -> bool:
    return LAYOUTS[family(model.config)].stock.__module__.startswith("transformers.")


def _candidates(model: PreTrainedModel, widths: Mapping[str, int]) -> list[_Candidate]:
    """The model's own family, then those that compute the same."""
    settings = model.config.to_dict() | dict(widths) | {"head_dim": head_dim(model)}
    for key in ("model_type", "architectures", "auto_map", "per_layer_config", "consumer_bias"):
        settings.pop(key, None)
    if "ffn_dim" in settings:  # OPT's name for it.
        settings["ffn_dim"] = settings.pop("intermediate_size")
    own = family(model.config)
    candidates = [_Candidate(own, settings, {})]
    if own in _SISTERS:
        name, changes = _SISTERS[own]
        sisters_class: Any = LAYOUTS[name].stock
        known = sisters_class.config_class().to_dict()
        common = {key: value for key, value in settings.items() if key in known}
        candidates.append(_Candidate(name, common | changes, changes))
    return candidates


def _takes_heads(model: PreTrainedModel, queries: int, keys: int) -> bool:
    widths = layer_widths(model)[0] | {"num_attention_heads": queries, "num_key_value_heads": keys}
    layers = len(decoder_blocks(model))
    biases = _biases(model)
    for candidate in _candidates(model, widths):
        # One layer shows it.
        lists = {key: v[:1] for key, v in candidate.settings.items() if isinstance(v, list) and len(v) == layers}
        try:
            stock = candidate.build(**lists, num_hidden_layers=1)
        except _REFUSALS:
            continue
        found = layer_widths(stock)[0]
        same = all(found[key] == widths[key] for key in ("num_attention_heads", "num_key_value_heads"))
        if same and head_dim(stock) == head_dim(model) and _biases(stock) == biases:
            return True
    return False


def _dense_heads(model: PreTrainedModel) -> int:
    heads: int = model.config.to_dict()["num_attention_heads"]
    return heads


def _biases(model: PreTrainedModel) -> set[str]:
    return {name for name in decoder_blocks(model)[0].state_dict() if name.endswith(".bias")}


def _why_stock(model: PreTrainedModel) -> str:
    counts = head_counts(model)
    width = next(group.width for group in all_groups(model) if group.kind == "attention")
    if len(counts) == _dense_heads(model) // width:
        return "all layers have the same widths"
    taken = ", ".join(str(count) for count in sorted(counts))
    return f"all layers have the same widths; of query heads its stock configuration takes {taken}, not other numbers"


def _with_tensors_of(model: PreTrainedModel, candidate: _Candidate) -> PreTrainedModel | None:
    """The stock model of a family with the given one's tensors; None if it has other tensors."""
    stock = candidate.build()
    state = model.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in stock.state_dict().items()}:
        return None
    stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    return stock.eval()
