"""Drawn token sequences in a file, and their identity."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from numprune.files import replace_on_success


def save_samples(input_ids: Tensor, path: Path) -> None:
    """Writes (samples, length) token ids as a `.safetensors` file that serves as calibration data again."""
    with replace_on_success(path) as temporary:
        save_file({"input_ids": input_ids.to(torch.int32).contiguous()}, temporary, {"sha256": fingerprint(input_ids)})


def load_samples(path: Path) -> Tensor:
    """Reads what `save_samples` wrote, as int64."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("input_ids").long()


def fingerprint(input_ids: Tensor) -> str:
    """SHA-256 of the token ids and their shape."""
    digest = hashlib.sha256(json.dumps(list(input_ids.shape)).encode())
    digest.update(input_ids.long().contiguous().numpy().tobytes())
    return digest.hexdigest()
