"""Statistics of calibration inputs, one decoder block a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from numprune.cholesky import shrinkage
from numprune.files import replace_on_success

Damping = float | Literal["auto"]


@dataclass(frozen=True)
class Moments:
    """First and second moments of what enters one output projection.

    Attributes:
        gram: (D, D) X^T X, a sum over tokens; float32, or float64 for a model in float64.
        mean: (D,) of X over tokens, in the same precision.
        count: Tokens seen.
    """

    gram: Tensor
    mean: Tensor
    count: int

    def damping(self, setting: Damping) -> float:
        """Damping relative to the mean diagonal: the setting, or with `auto` what `shrinkage` says."""
        return shrinkage(self.gram, self.count) if setting == "auto" else setting


@dataclass(frozen=True)
class BlockStatistics:
    """The moments of every prunable group of one decoder block, by the group's name."""

    block: int
    moments: dict[str, Moments]

    def save(self, folder: Path) -> None:
        """Writes the block's file into a folder."""
        tensors: dict[str, Tensor] = {}
        for name, moments in self.moments.items():
            tensors |= {f"{name}.gram": moments.gram.cpu(), f"{name}.mean": moments.mean.cpu()}
        # One entry: safetensors writes several in random order, and the same statistics shall be the same bytes.
        counts = json.dumps({name: moments.count for name, moments in self.moments.items()})
        with replace_on_success(_path(folder, self.block)) as temporary:
            save_file(tensors, temporary, {"counts": counts})

    @classmethod
    def load(cls, folder: Path, block: int) -> "BlockStatistics":
        """Reads one block's file from a folder."""
        with safe_open(_path(folder, block), "pt") as file:
            counts = json.loads(file.metadata()["counts"])
            moments = {
                name: Moments(file.get_tensor(f"{name}.gram"), file.get_tensor(f"{name}.mean"), count)
                for name, count in counts.items()
            }
        return cls(block, moments)


@dataclass(frozen=True)
class Measured:
    """What ranking and recovery draw on.

    Attributes:
        statistics: Folder with the statistics of the dense model's blocks.
        input_ids: (samples, length) calibration tokens.
        batch_size: Samples that go through a block together.
        device: Where blocks and equations are computed; None: where the model is.
    """

    statistics: Path
    input_ids: Tensor
    batch_size: int = 8
    device: torch.device | None = None

    def block(self, index: int) -> BlockStatistics:
        """The statistics of one block."""
        return BlockStatistics.load(self.statistics, index)


def _path(folder: Path, block: int) -> Path:
    return folder / f"block-{block:03d}.safetensors"
