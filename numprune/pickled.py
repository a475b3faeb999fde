"""Checkpoints of other projects, which are pickles more often than not."""

import argparse
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from numprune.errors import NumpruneError

# Of files that may hold pickles, which run code when they are opened.
SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})


def load_tensors(path: Path, *, wrappers: Sequence[str] = ()) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint file; code in a pickle is not run.

    Args:
        path: A `.safetensors` file or a pickle as torch writes it.
        wrappers: Keys under which training programs put a model's tensors; the first that is there is taken.

    Raises:
        NumpruneError: If the file is missing or damaged, would run code, or holds no tensors by name.
    """
    if not path.is_file():
        raise NumpruneError(f"{path} not found: it must be a checkpoint file.")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise NumpruneError(
            f"{path} holds more than tensors, or is damaged; what could run code is not loaded: {reason}"
        ) from None
    except (RuntimeError, EOFError, ValueError, SafetensorError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise NumpruneError(f"{path} is no checkpoint or damaged: {reason}") from None
    key = next((key for key in wrappers if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
    tensors = content if key is None else content[key]
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise NumpruneError(f"{path} holds no tensors by name, neither at the top nor under {', '.join(wrappers)}.")
    return tensors


def tensor_misfits(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What is missing among tensors, what nobody asks for and what has a wrong shape, for messages; empty if nothing.

    Args:
        tensors: By name.
        expected: Shapes by name.
    """
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    found = {"missing": expected.keys() - tensors.keys(), "of unknown use": tensors.keys() - expected.keys()}
    named = {**found, "of a wrong shape": wrong}
    return "; ".join(f"{what}: {', '.join(sorted(names)[:5])}" for what, names in named.items() if names)


def _unpickled(path: Path) -> Any:
    # Training scripts put their options beside the weights; a namespace is data.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
