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

from numprune.architectures import head_dim, layer_widths
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
    if not LAYOUTS[family(model.config)].stock.__module__.startswith("transformers."):
        return Form(None, f"transformers has no class of the family {family(model.config)}")
    widths = layer_widths(model)
    if any(0 in layer.values() for layer in widths):
        return Form(None, "whole modules are gone, which no stock class knows")
    if any(layer != widths[0] for layer in widths):
        return Form(None, "the layers differ in width, which no stock class knows")
    settings = model.config.to_dict() | widths[0] | {"head_dim": head_dim(model)}
    for key in ("model_type", "architectures", "auto_map", "per_layer_config", "consumer_bias"):
        settings.pop(key, None)
    if "ffn_dim" in settings:  # OPT's name for it.
        settings["ffn_dim"] = settings.pop("intermediate_size")
    own = family(model.config)
    try:
        stock = _with_tensors_of(model, own, settings)
        return Form(stock, "all layers have the same widths" if stock else _NO_PLACE)
    except (StrictDataclassError, ValueError) as error:  # Of the configuration, or of the attention's constructor.
        refusal = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ").rstrip(".")
    if own in _SISTERS:
        name, changes = _SISTERS[own]
        sisters_class: Any = LAYOUTS[name].stock
        known = sisters_class.config_class().to_dict()
        common = {key: value for key, value in settings.items() if key in known}
        sister = _with_tensors_of(model, name, common | changes)
        if sister:
            listed = ", ".join(f"{key} {value}" for key, value in changes.items())
            return Form(
                sister,
                f"{own}'s stock configuration refuses the head count ({refusal}), and {name} with {listed} computes "
                "the same",
            )
    return Form(None, f"the stock configuration refuses the head count ({refusal})")


def _with_tensors_of(model: PreTrainedModel, name: str, settings: dict[str, Any]) -> PreTrainedModel | None:
    """The stock model of a family with the given one's tensors; None if it has other tensors."""
    stock_class: Any = LAYOUTS[name].stock
    with torch.device("meta"):
        stock = stock_class(stock_class.config_class(**settings))
    state = model.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in stock.state_dict().items()}:
        return None
    stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    return stock.eval()
