"""Pruned checkpoints out: in a form that loads where numprune is not installed, whole or absent."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from numprune import ragged
from numprune.architectures import decoder_blocks, head_dim, layer_widths
from numprune.checkpoint import CALIBRATION_FILE, PLAN_FILE, load_config, load_whole, stored_dtype
from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from numprune.multimodal import around, holder_of
from numprune.plan import PruningPlan
from numprune.ragged import DECODERS, FAMILIES
from numprune.ranks import is_first, meet
from numprune.samples import Samples, save_samples
from numprune.shards import write_weights
from numprune.stock import as_stock, family

# Tokenizer and generation settings stay byte for byte: saving them anew would rewrite them in the form of this version.
_CARRIED_OVER = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
)


def save_pruned(
    model: PreTrainedModel, source: Path, output: Path, plan: PruningPlan, samples: Samples | Tensor
) -> str:
    """Saves a sliced model so that `from_pretrained` loads it anywhere.

    The folder holds sharded safetensors in the source's data type, the source's tokenizer and generation settings, the
    plan, and the calibration samples. Where all layers have the same widths it is an ordinary checkpoint of a stock
    class. Otherwise the configuration has a `per_layer_config`, and the modelling file that reads it lies beside it.
    What the source has around its language model is saved with it.

    Args:
        model: A model whose layers were sliced.
        source: Folder of the dense model.
        output: Folder to write; it appears only when complete.
        plan: What was sliced by.
        samples: Behind the plan, or their (samples, length) token ids.

    Returns:
        The class that the checkpoint loads into and why; one sentence.

    Raises:
        NumpruneError: If writing fails, for want of space for example; nothing is left behind.
    """
    form = as_stock(model)
    pruned: Any = form.model or as_ragged(model)
    config = load_config(source)
    pruned.to(stored_dtype(source))
    if holder_of(config):
        pruned = around(pruned, load_whole(source), ragged=form.model is None)
    if is_first():
        _write(pruned, model, output, source=source, plan=plan, samples=samples)
    meet()
    return f"{type(pruned).__name__}: {form.reason}."


def _write(
    pruned: Any, model: PreTrainedModel, output: Path, *, source: Path, plan: PruningPlan, samples: Samples | Tensor
) -> None:
    try:
        with replace_on_success(output) as temporary:
            pruned.save_pretrained(temporary, state_dict={})  # Configuration and code.
            state = pruned.state_dict()
            if not holder_of(pruned.config):
                state = revert_weight_conversion(pruned, state)  # The names of the family's checkpoints.
            own = pruned.get_decoder().layers
            path = next(name for name, module in pruned.named_modules() if module is own)
            write_weights(decoder_blocks(model), path, state, temporary, pruned.dtype)
            plan.save(temporary / PLAN_FILE)
            save_samples(samples, temporary / CALIBRATION_FILE)
            for pattern in _CARRIED_OVER:
                for file in source.glob(pattern):
                    shutil.copyfile(file, temporary / file.name)
    except (OSError, SafetensorError) as error:
        raise NumpruneError(
            f"{output} cannot be written: {error}. Nothing half-written is left: free some space and run again."
        ) from error


def as_ragged(model: PreTrainedModel) -> PreTrainedModel:
    """The same tensors in the class that a checkpoint with layers of different widths loads into."""
    own = family(model.config)
    config_class, model_class = FAMILIES[own]
    config_class.register_for_auto_class()
    model_class.register_for_auto_class("AutoModelForCausalLM")
    settings = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "per_layer_config", "consumer_bias"):
        settings.pop(key, None)
    if own in DECODERS:  # Saving adds only the classes that are registered above.
        settings["auto_map"] = {"AutoModel": f"{Path(ragged.__file__).stem}.{DECODERS[own].__name__}"}
    settings["head_dim"] = head_dim(model)
    settings["per_layer_config"] = dict(enumerate(layer_widths(model)))
    state = model.state_dict()
    with torch.device("meta"):
        pruned = model_class(config_class(**settings))
        if state.keys() - pruned.state_dict().keys():  # Biases that the family's own configuration does not give.
            pruned = model_class(config_class(**settings | {"consumer_bias": True}))
    for name, bias in pruned.state_dict().items():
        if name.endswith(".bias") and name not in state:
            state[name] = torch.zeros(bias.shape, dtype=model.dtype, device=model.device)
    pruned.load_state_dict(state, assign=True)
    pruned.tie_weights()
    return pruned.eval()
