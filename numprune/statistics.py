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
from numprune.resume import writing
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
        """The same on a device."""
        return Moments(self.gram.to(device), self.mean.to(device), self.count)

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
        # From a GPU this is to pinned memory, which takes a fraction of the time. It has to be waited for.
        moments = {
            name: Moments(of.gram.to("cpu", non_blocking=True), of.mean.to("cpu", non_blocking=True), of.count)
            for name, of in self.moments.items()
        }
        for device in {of.gram.device for of in self.moments.values() if of.gram.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return BlockStatistics(self.block, moments)

    def save(self, folder: Path) -> None:
        """Writes the block's file into a folder.

        Raises:
            NumpruneError: If it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for name, moments in self.in_main_memory().moments.items():
            tensors |= {f"{name}.gram": moments.gram, f"{name}.mean": moments.mean}
        # One entry: safetensors writes several in random order, and the same statistics shall be the same bytes.
        counts = json.dumps({name: moments.count for name, moments in self.moments.items()})
        with writing(folder), replace_on_success(_path(folder, self.block)) as temporary:
            save_file(tensors, temporary, {"counts": counts})

    @staticmethod
    def is_saved(folder: Path, block: int) -> bool:
        """Whether a folder has the block's file."""
        return _path(folder, block).exists()

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


def product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right over (N, ...) rows: a share of second moments, accumulated in at least float32.

    In bfloat16 and float16 a GPU's tensor cores take the rows as they are: the products are exact in float32, in which
    they are added up. Elsewhere rows are multiplied in float32, without TF32, or in float64 if they are.
    """
    if left.is_cuda and left.dtype == right.dtype and left.dtype in {torch.bfloat16, torch.float16}:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    precision = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return left.to(precision).T @ right.to(precision)


@dataclass(frozen=True)
class Measured:
    """What ranking and recovery draw on.

    Attributes:
        statistics: Folder with the statistics of the dense model's blocks.
        samples: For calibration; their (samples, length) token ids will do where there is nothing else.
        batch_size: Samples that go through a block together.
        device: Where blocks and equations are computed; None: where the model is.
        work: Folder that remembers how far long work came (`numprune.resume`); None: it begins anew every time.
    """

    statistics: Path
    samples: Samples | Tensor
    batch_size: int = 8
    device: torch.device | None = None
    work: Path | None = None

    def block(self, index: int) -> BlockStatistics:
        """The statistics of one block."""
        return BlockStatistics.load(self.statistics, index)


def _path(folder: Path, block: int) -> Path:
    return folder / f"block-{block:03d}.safetensors"
