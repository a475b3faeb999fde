"""Statistics of calibration inputs, one decoder block a file."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from numprune.files import replace_on_success


@dataclass(frozen=True)
class Moments:
    """First and second moments of what enters one output projection.

    Attributes:
        gram: (D, D) float32, X^T X, a sum over tokens.
        mean: (D,) float32, of X over tokens.
        count: Tokens seen.
    """

    gram: Tensor
    mean: Tensor
    count: int


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


def _path(folder: Path, block: int) -> Path:
    return folder / f"block-{block:03d}.safetensors"
