"""Statistics of calibration inputs, one decoder block a file."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from numprune.cholesky import shrinkage
from numprune.files import replace_on_success
from numprune.memory import in_main_memory
from numprune.overlap import read_ahead
from numprune.resume import reading, writing
from numprune.samples import Samples

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

    def to(self, device: torch.device) -> "Moments":
        """The same on a device; from pinned memory, a GPU copies them when it comes to that."""
        ahead = device.type == "cuda"
        return Moments(self.gram.to(device, non_blocking=ahead), self.mean.to(device, non_blocking=ahead), self.count)

    def damping(self, setting: Damping) -> float:
        """Damping relative to the mean diagonal: the setting, or with `auto` what `shrinkage` says."""
        return shrinkage(self.gram, self.count) if setting == "auto" else setting


@dataclass(frozen=True)
class BlockStatistics:
    """The moments of every prunable group of one decoder block, by the group's name."""

    block: int
    moments: dict[str, Moments]

    def in_main_memory(self) -> "BlockStatistics":
        """The same in main memory."""
        tensors = in_main_memory(self._tensors())
        moments = {
            name: Moments(tensors[f"{name}.gram"], tensors[f"{name}.mean"], of.count)
            for name, of in self.moments.items()
        }
        return BlockStatistics(self.block, moments)

    def save(self, folder: Path) -> None:
        """Writes the block's file into a folder.

        Raises:
            NumpruneError: If it cannot be written.
        """
        # One entry: safetensors writes several in random order, and the same statistics shall be the same bytes.
        counts = json.dumps({name: moments.count for name, moments in self.moments.items()})
        with writing(folder), replace_on_success(_path(folder, self.block)) as temporary:
            save_file(in_main_memory(self._tensors()), temporary, {"counts": counts})

    @staticmethod
    def is_saved(folder: Path, block: int) -> bool:
        """Whether a folder has the block's file."""
        return _path(folder, block).exists()

    @classmethod
    def load(cls, folder: Path, block: int, *, pinned: bool = False) -> "BlockStatistics":
        """One block's file in a folder: mapped, or read into memory that a GPU copies from by itself, if `pinned`."""
        path = _path(folder, block)
        with reading(path), safe_open(path, "pt") as file:
            counts = json.loads(file.metadata()["counts"])
            moments = {
                name: Moments(_read(file, f"{name}.gram", pinned), _read(file, f"{name}.mean", pinned), count)
                for name, count in counts.items()
            }
        return cls(block, moments)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, moments in self.moments.items():
            tensors |= {f"{name}.gram": moments.gram, f"{name}.mean": moments.mean}
        return tensors


@dataclass(frozen=True)
class Measured:
    """What ranking and recovery draw on.

    Attributes:
        statistics: Folder with the statistics of the dense model's blocks.
        samples: For calibration; their (samples, length) token ids will do where there is nothing else.
        batch_size: Samples that go through a block together; None: `fitting_batch`.
        device: Where blocks and equations are computed; None: where the model is.
        work: Folder that remembers how far long work came (`numprune.resume`); None: it begins anew every time.
    """

    statistics: Path
    samples: Samples | Tensor
    batch_size: int | None = None
    device: torch.device | None = None
    work: Path | None = None

    def block(self, index: int) -> BlockStatistics:
        """The statistics of one block."""
        return BlockStatistics.load(self.statistics, index)

    def blocks(self, indices: Iterable[int]) -> Iterator[BlockStatistics]:
        """The statistics of one block after the other; for a GPU, a thread reads the next while it works with one."""
        if self.device is None or self.device.type != "cuda":
            return map(self.block, indices)
        return read_ahead(lambda index: BlockStatistics.load(self.statistics, index, pinned=True), indices)


def _read(file: Any, name: str, pinned: bool) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    return tensor.pin_memory() if pinned else tensor


def _path(folder: Path, block: int) -> Path:
    return folder / f"block-{block:03d}.safetensors"
