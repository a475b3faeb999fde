"""Checkpoints in: checked before they are loaded."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import logging as transformers_logging

from numprune import pickled
from numprune.architectures import check_supported, decoder_blocks
from numprune.errors import NumpruneError
from numprune.memory import free_memory
from numprune.multimodal import holder_of, language_config, language_model, model_class
from numprune.shards import INDEX, SINGLE
from numprune.streaming import StoredTensors, is_finite, store

_DOWNLOADED = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja")
PLAN_FILE = "pruning_plan.json"
# In a folder of its own: some engines take every safetensors file beside config.json for weights.
CALIBRATION_FILE = "calibration/input_ids.safetensors"


def fetch(model: str, revision: str | None = None) -> Path:
    """The folder of a model: the path itself, or a download from the Hugging Face Hub.

    Raises:
        NumpruneError: If there is neither such a folder nor such a repository, or a folder is asked for a revision.
    """
    if Path(model).is_dir():
        if revision is not None:
            raise NumpruneError(f"{model} is a folder, which has no revision {revision}: leave --revision out.")
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_DOWNLOADED)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise NumpruneError(f"{model} is neither a folder nor a model that the Hub delivers: {reason}") from None


def commit_of(model: str, folder: Path) -> str | None:
    """The commit on the Hugging Face Hub that `fetch` found a model in; None for a folder."""
    return None if Path(model).is_dir() else folder.name  # As the cache of the Hub names its folders.


def load_config(model: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """Reads `config.json` of a model folder, or of a model on the Hugging Face Hub.

    Raises:
        NumpruneError: If it is missing or no configuration that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise NumpruneError(f"{model}: no usable config.json: {str(error).splitlines()[0]}") from None


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model folder, or None if it has none."""
    if not any(Path(model).glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def load_model(
    folder: Path, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Loads a causal language model from a folder after checking that it is whole and finite.

    Of a model that holds a language model among other parts this gives the language model.

    Args:
        folder: With `config.json` and safetensors weights.
        dtype: Of the weights; `auto` keeps the checkpoint's.
        device: Where to put them.

    Raises:
        NumpruneError: If the architecture is not supported, a file is missing, truncated or a pickle, a tensor is
            missing or has the wrong shape, or a weight is NaN or infinite.
    """
    return language_model(load_whole(folder, dtype=dtype, device=device))


def load_whole(
    folder: Path, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """As `load_model`, with the parts around the language model if there are some."""
    config = load_config(folder)
    check_supported(language_config(config))
    weight_files(folder)
    transformers_logging.disable_progress_bar()  # Steps show progress of their own.
    options: dict[str, Any] = {} if holder_of(config) else {"trust_remote_code": False}
    try:
        loaded: Any = model_class(config).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise NumpruneError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    model, report = loaded
    if report["missing_keys"]:
        raise NumpruneError(f"{folder}: the weights lack {', '.join(sorted(report['missing_keys'])[:5])}.")
    for name, tensor in model.state_dict().items():
        if not is_finite(tensor):
            raise NumpruneError(f"{folder}: {name} holds NaN or infinite values: the checkpoint is damaged.")
    on_device: PreTrainedModel = model.to(device)
    return on_device.eval()


def open_model(folder: Path, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Opens a causal language model whose decoder blocks are read one at a time, see `numprune.streaming`.

    Embeddings, last norm and head are in memory. Weights are checked to be finite when they are read. Checkpoints whose
    tensors are not those of the modules but have to be joined, split or kept in float32 are loaded as a whole, and so
    are models that hold a language model among other parts.

    Args:
        folder: With `config.json` and safetensors weights.
        dtype: To compute in; `auto` keeps the checkpoint's.

    Raises:
        NumpruneError: As `load_model`.
    """
    config = load_config(folder)
    if holder_of(config):
        return load_model(folder, dtype=dtype)
    check_supported(config)
    where = {key: file for file in weight_files(folder) for key in _shapes(file)}
    precision = dtype if isinstance(dtype, torch.dtype) else stored_dtype(folder)
    with _parameters_on_meta():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=precision, trust_remote_code=False)
    blocks = decoder_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    state = model.state_dict()
    in_blocks = {name for name in state if name.startswith(f"{prefix}.")}
    shapes = {key: shape for file in set(where.values()) for key, shape in _shapes(file).items()}
    keys = _keys(model, where)
    as_stored = all(shapes.get(keys.get(name, "")) == list(state[name].shape) for name in in_blocks)
    if not as_stored or getattr(model, "_keep_in_fp32_modules", None):
        return load_model(folder, dtype=dtype)
    outside = {name: (where[keys[name]], keys[name]) for name in (state.keys() & keys.keys()) - in_blocks}
    for name, (_, key) in outside.items():
        configured = list(state[name].shape)
        if shapes[key] != configured:
            raise NumpruneError(f"{folder}: {key} is {shapes[key]}, config.json says {configured}: fetch it again.")
    model.load_state_dict(StoredTensors(outside, precision).read(), strict=False, assign=True)
    model.tie_weights()
    if any(tensor.is_meta and name not in in_blocks for name, tensor in model.state_dict().items()):
        return load_model(folder, dtype=dtype)
    for index, block in enumerate(blocks):
        named = {name: keys[f"{prefix}.{index}.{name}"] for name in block.state_dict()}
        store(block, {name: (where[key], key) for name, key in named.items()})
    opened: PreTrainedModel = model.eval()
    return opened


def _keys(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The keys of a checkpoint by the names that the modules have for them: GPT-NeoX calls its head `embed_out`."""
    renamings = [found for found in get_model_conversion_mapping(model) if isinstance(found, WeightRenaming)]
    state = model.state_dict()
    return {rename_source_key(key, renamings, [], model.base_model_prefix, state)[0]: key for key in stored}


def load_or_open(folder: Path, *, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
    """The model of a folder, on the device as a whole if it takes at most half of what is free there, else opened.

    Raises:
        NumpruneError: As `load_model`.
    """
    size = weight_bytes(folder)
    if isinstance(dtype, torch.dtype):
        size = size * dtype.itemsize // stored_dtype(folder).itemsize
    if size <= free_memory(device) / 2:
        return load_model(folder, dtype=dtype, device=device)
    return open_model(folder, dtype=dtype)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Makes modules whose parameters cost nothing, but whose buffers are there: no file holds all of them."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, "pt") as opened:
        return {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 - No dictionary.


def stored_dtype(folder: Path) -> torch.dtype:
    """The data type of a checkpoint: as its configuration says, else that of its first tensor."""
    configured = load_config(folder).dtype
    if isinstance(configured, torch.dtype):
        return configured
    with safe_open(weight_files(folder)[0], "pt") as opened:
        return opened.get_tensor(next(iter(opened.keys()))).dtype


def load_shapes(folder: Path) -> PreTrainedModel:
    """The model of a folder without its weights, on the meta device: shapes cost no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(language_config(load_config(folder)))


def weight_bytes(folder: Path) -> int:
    """Size of all safetensors files of a model folder."""
    return sum(file.stat().st_size for file in weight_files(folder))


def block_bytes(folder: Path, dtype: torch.dtype | str) -> int:
    """Bytes of all decoder blocks of a model folder in a data type; `auto` is the checkpoint's."""
    itemsize = (dtype if isinstance(dtype, torch.dtype) else stored_dtype(folder)).itemsize
    return itemsize * sum(parameter.numel() for parameter in decoder_blocks(load_shapes(folder)).parameters())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to be there and whole.

    Raises:
        NumpruneError: If one is missing or truncated, or there are only pickles.
    """
    if (folder / INDEX).exists():
        try:
            shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        except (json.JSONDecodeError, KeyError, AttributeError):
            raise NumpruneError(f"{folder / INDEX} is damaged: fetch the checkpoint again.") from None
        files = [folder / Path(name).name for name in sorted(set(shards))]
    elif (folder / SINGLE).exists():
        files = [folder / SINGLE]
    elif any(path.suffix.lower() in pickled.SUFFIXES for path in folder.iterdir()):
        raise NumpruneError(
            f"{folder} holds its weights only as pickles, which can run code when opened. Convert it once with "
            "`model.save_pretrained(folder)` from a source you trust."
        )
    else:
        raise NumpruneError(
            f"{folder} holds no weights: {SINGLE} or {INDEX} is missing. Of models on the Hub pickles are not fetched."
        )
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except FileNotFoundError:
            raise NumpruneError(f"{file} is missing: fetch the checkpoint again.") from None
        except SafetensorError as error:
            raise NumpruneError(f"{file} is truncated or damaged ({error}): fetch the checkpoint again.") from None
    return files


def fingerprint(folder: Path) -> str:
    """SHA-256 over the configuration and the weights of a model folder."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as readers:  # Hashing is work for a core, not waiting for a disk.
        for of_file in readers.map(_digest, (folder / "config.json", *weight_files(folder))):
            digest.update(of_file)
    return digest.hexdigest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def check_output(folder: Path) -> None:
    """Refuses, before any work, an output folder that is taken or cannot be replaced.

    Raises:
        NumpruneError: If it holds anything, or is a mount point or the working directory.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NumpruneError(f"{folder} already holds something: choose another --output or remove it.")
    if folder.exists() and (folder.is_mount() or folder.samefile(Path.cwd())):
        raise NumpruneError(f"{folder} cannot be replaced as a whole: name a folder below it.")


def check_space(path: Path, needed_bytes: int) -> None:
    """Refuses, before any work, a disk that is full.

    Raises:
        NumpruneError: If the disk that a path is going to lie on has less than `needed_bytes` left.
    """
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise NumpruneError(
            f"{path}: {needed_bytes:,} bytes are needed, {free:,} are free. Free some or write elsewhere."
        )
