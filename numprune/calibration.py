"""Samples from text or from a file: what calibrates and what evaluates."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from numprune.checkpoint import load_config, load_tokenizer
from numprune.errors import NumpruneError
from numprune.multimodal import language_config
from numprune.samples import Samples, checked_inputs
from numprune.texts import TEXTS, cut_text, read_text

DEFAULT_SAMPLES = 128
LONGEST_DEFAULT = 2048
FORMS = (
    "a text file, a .jsonl file with a `text` field, a .safetensors file with `input_ids`, or a Hub data set NAME:SPLIT"
)
_NAMES = " or ".join(TEXTS)


def draw_samples(
    data: str, model: str, *, samples: int = DEFAULT_SAMPLES, length: int | None = None, seed: int = 0
) -> Samples:
    """Draws calibration sequences.

    Text is tokenized as one stream without added special tokens and cut into windows of `length`; which of them are
    taken, and in what order, is up to the seed. A `.safetensors` file gives its first `samples` sequences as they are,
    with what else the model is given of each: those arguments of its forward pass that its configuration names as
    `sample_inputs`.

    Args:
        data: A text file, a `.jsonl` file with a `text` field, a `.safetensors` file with `input_ids`, or a Hugging
            Face data set as `name:split` or `name:configuration:split`.
        model: Folder or Hub id, for its tokenizer and vocabulary.
        samples: Sequences to draw.
        length: Tokens a sequence; by default 2048 or the model's maximum if that is less.
        seed: Of the draw.

    Raises:
        NumpruneError: If the data cannot be read, is too short, holds ids outside the vocabulary, or lacks what the
            model is given besides.
    """
    config = language_config(load_config(model))
    length = sequence_length(length, config)
    if data.endswith(".safetensors"):
        rows = _read_samples(Path(data), config)
        if rows.length < length or len(rows) < samples:
            raise NumpruneError(
                f"{data}: input_ids is {len(rows)} x {rows.length}, but {samples} samples of {length} tokens are "
                "asked for. Lower the samples or the length, or give more data."
            )
        return _cut(rows, length, data)[:samples]
    windows = _windows(tokenize(data, model), length)
    if len(windows) < samples:
        raise NumpruneError(
            f"{data}: {len(windows)} windows of {length} tokens, but {samples} are asked for. Lower the samples or the "
            "length, or give more text."
        )
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    return Samples(windows[chosen])


def evaluation_windows(
    data: str,
    model: str,
    *,
    length: int | None = None,
    max_tokens: int | None = None,
    documents: Sequence[str] | None = None,
) -> tuple[Samples, int | None]:
    """All non-overlapping windows of a text, from its start; what does not fill a window is left out.

    Where a model is given more than token ids, a window is a sequence of the file.

    Args:
        data: As for `draw_samples`, or the name of one of `numprune.texts.TEXTS`.
        model: Folder or Hub id, for its tokenizer and vocabulary.
        length: Tokens a window; by default 2048 or the model's maximum if that is less.
        max_tokens: Stop after so many tokens.
        documents: Of a text of `TEXTS`, where they are at hand; else they come from the Hub.

    Returns:
        The windows, and the UTF-8 bytes of text that they stand for (None for `input_ids`).

    Raises:
        NumpruneError: As `draw_samples`.
    """
    config = language_config(load_config(model))
    length = sequence_length(length, config)
    if data.endswith(".safetensors"):
        rows = _read_samples(Path(data), config)
        if rows.inputs:
            rows = _cut(rows, length, data)[: None if max_tokens is None else max_tokens // length]
        else:
            rows = Samples(_windows(rows.input_ids.flatten()[:max_tokens], length))
        return _some(rows, data, length), None
    if data in TEXTS:
        tokenizer = _tokenizer(model, data)
        tokens = cut_text(data, documents or read_text(data), tokenizer, length).flatten()
    else:
        tokens = tokenize(data, model)
    windows = _windows(tokens[:max_tokens], length)
    samples = _some(Samples(windows), data, length)
    text = str(_tokenizer(model, data).decode(windows.flatten(), skip_special_tokens=False))
    return samples, len(text.encode())


def check_data(data: str, *, named: bool = False) -> None:
    """Raises NumpruneError if the data is neither a file nor, by its form, a Hub data set.

    Args:
        data: What to check.
        named: Whether it may be the name of one of `numprune.texts.TEXTS`.
    """
    if named and data in TEXTS:
        return
    if not Path(data).is_file() and (":" not in data or data.endswith((".txt", ".jsonl", ".json", ".safetensors"))):
        raise NumpruneError(f"{data} not found. Data is {FORMS}{f', or {_NAMES}' if named else ''}.")


def tokenize(data: str, model: str) -> Tensor:
    """Tokens of a text file, JSON lines or a Hub data set as one stream; documents are joined by an empty line."""
    text = _read_text(data)
    if not text.strip():
        raise NumpruneError(f"{data} holds no text.")
    tokenizer = _tokenizer(model, data)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(tokens, dtype=torch.int64)


def sequence_length(length: int | None, config: PreTrainedConfig) -> int:
    """The asked-for length, or 2048 tokens or the model's maximum if that is less.

    Raises:
        NumpruneError: If the length is longer than the model's maximum, or below 2.
    """
    maximum = getattr(config, "max_position_embeddings", None) or LONGEST_DEFAULT
    if length is None:
        return min(LONGEST_DEFAULT, maximum)
    if not 2 <= length <= maximum:
        raise NumpruneError(f"length must be in [2, {maximum}], the model's maximum; got {length}")
    return length


def _windows(tokens: Tensor, length: int) -> Tensor:
    return tokens[: len(tokens) // length * length].view(-1, length)


def _some(samples: Samples, data: str, length: int) -> Samples:
    if not len(samples):
        raise NumpruneError(f"{data}: no window of {length} tokens; lower the length or give more text.")
    return samples


def _cut(samples: Samples, length: int, data: str) -> Samples:
    """The first tokens of every sample; what else belongs to a sample belongs to all of it."""
    if samples.inputs and samples.length != length:
        raise NumpruneError(
            f"{data}: sequences of {samples.length} tokens are taken whole, because {', '.join(samples.inputs)} "
            f"belongs to all of them; got the length {length}."
        )
    return Samples(samples.input_ids[:, :length].contiguous(), samples.inputs)


def _read_samples(path: Path, config: PreTrainedConfig) -> Samples:
    try:
        inputs = load_file(path)
        rows = inputs.pop("input_ids")
    except FileNotFoundError:
        raise NumpruneError(f"{path} not found. Data is {FORMS}.") from None
    except (SafetensorError, KeyError) as error:
        raise NumpruneError(f"{path} holds no readable tensor `input_ids`: {error}") from None
    if rows.ndim != 2 or rows.is_floating_point() or not rows.numel():
        raise NumpruneError(
            f"{path}: input_ids must be integers of shape (samples, length), got {rows.dtype} {tuple(rows.shape)}"
        )
    rows = rows.to(torch.int64)
    if rows.min() < 0 or rows.max() >= config.vocab_size:
        raise NumpruneError(
            f"{path}: token ids must be in [0, {config.vocab_size}), got {rows.min()} to {rows.max()}. Was another "
            "tokenizer used?"
        )
    return Samples(rows, checked_inputs(inputs, getattr(config, "sample_inputs", {}), len(rows), path))


def _read_text(data: str) -> str:
    check_data(data)
    path = Path(data)
    if not path.is_file():
        return _read_hub_dataset(data)
    try:
        if path.suffix not in (".jsonl", ".json"):
            return path.read_text(encoding="utf-8")
        with path.open(encoding="utf-8") as lines:
            return "\n\n".join(_field(line, f"{path}, line {number}") for number, line in enumerate(lines, 1))
    except UnicodeDecodeError:
        raise NumpruneError(f"{data} is no UTF-8 text. Data is {FORMS}.") from None


def _field(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise NumpruneError(f"{place}: not a JSON object with a string field `text`.")
    return text


def _read_hub_dataset(data: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError:
        raise NumpruneError(f"{data} is a Hub data set, which needs `pip install datasets`.") from None
    name, *configuration, split = data.split(":")
    try:
        rows = load_dataset(name, *configuration, split=split)
    except Exception as error:  # Whatever the Hub, the network or the data set's own files come up with.
        raise NumpruneError(f"The data set {data} cannot be loaded: {error}") from error
    if "text" not in rows.column_names:
        raise NumpruneError(f"The data set {data} has no column `text`, only {', '.join(rows.column_names)}.")
    return "\n\n".join(rows["text"])


def _tokenizer(model: str, data: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise NumpruneError(
            f"{model} has no tokenizer, which {data} needs: add tokenizer.json, or give a .safetensors file with "
            "input_ids."
        )
    return tokenizer
