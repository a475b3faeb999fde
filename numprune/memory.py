"""How much memory there is, and hidden states that lie where there is room for them."""

import ctypes
import os
import resource
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from numprune.errors import NumpruneError

Place = Literal["device", "memory", "disk"]

# Of the free memory, one set of hidden states may take so much: up to nine live at once, beside blocks and moments.
_SHARE = 1 / 8
_GROUP = Path("/sys/fs/cgroup")


def use_huge_pages() -> None:
    """Lets this process have large tensors in main memory in pages of 2 MB, unless its environment says otherwise.

    To be called before the first tensor is made. Matrices of calibration moments come and go by hundreds of megabytes:
    in pages of 4 KB the system takes longer to hand them out than many a product of them takes. Systems without huge
    pages ignore it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def return_unused_memory() -> None:
    """Gives the system back what tensors that are gone leave in the heap, where libc can (glibc does).

    Tensors of up to 32 MB come from there, aligned to huge pages: what lies between them is seldom used again, and
    grows block by block.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def total_memory(device: torch.device) -> int:
    """Bytes that a device has for this process, used or not: always the same, unlike what is free."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    bounds = [_physical_memory(), _group_limit(), resource.getrlimit(resource.RLIMIT_DATA)[0]]
    return min(bound for bound in bounds if bound is not None and bound != resource.RLIM_INFINITY)


def available_memory() -> int:
    """Bytes of main memory that this process can still get: of the machine, its control group and its own limits."""
    bounds = [_physical_memory()]
    proc = Path("/proc")
    if (proc / "meminfo").exists():
        bounds.append(1024 * _field(proc / "meminfo", "MemAvailable:"))
        limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
        if limit != resource.RLIM_INFINITY:
            bounds.append(limit - 1024 * _field(proc / "self/status", "VmData:"))
    if (most := _group_limit()) is not None:
        # What is kept of files that were read is given back when it is asked for.
        used = int((_GROUP / "memory.current").read_text()) - _field(_GROUP / "memory.stat", "inactive_file")
        bounds.append(most - used)
    return max(min(bounds), 0)


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_limit() -> int | None:
    """Of the control group that containers put their processes into, seen from inside."""
    limit = _GROUP / "memory.max"
    most = limit.read_text().strip() if limit.exists() else "max"
    return None if most == "max" else int(most)


def _field(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a device computes."""
    if device.type == "cuda":
        # What torch keeps of tensors that are gone is given to the next ones.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return available_memory()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory does not suffice."""
    # Allocators of main memory and the libraries that compute on a GPU have no type of their own for it.
    messages = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)


def in_main_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in main memory, to be read at once."""
    # From a GPU this is to pinned memory, which takes a fraction of the time. It has to be waited for.
    moved = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return moved


def place_for(size: int, device: torch.device) -> Place:
    """Where hidden states of so many bytes go: to the compute device, else to main memory, else to disk."""
    if device.type == "cuda" and size <= _SHARE * free_memory(device):
        return "device"
    return "memory" if size <= _SHARE * available_memory() else "disk"


class HiddenStates(Sequence[Tensor]):
    """The hidden states of all samples, batch by batch: read on the compute device, kept where there is room.

    On disk they are a memory-mapped file without a name, which vanishes with the process however that ends.
    """

    def __init__(self, samples: int, device: torch.device, folder: Path | None = None) -> None:
        """Makes room when the first batch comes.

        Args:
            samples: That are going to be appended.
            device: Where they are computed with.
            folder: For a file if memory is short; by default that of the system's temporary files.
        """
        self._samples, self._device, self._folder = samples, device, folder
        self._bounds: list[tuple[int, int]] = []
        self._all: Tensor | None = None

    def append(self, batch: Tensor) -> None:
        """Adds the next (batch, length, width) hidden states."""
        if self._all is None:
            self._all = self._room(batch)
        start = self._bounds[-1][1] if self._bounds else 0
        self._bounds.append((start, start + len(batch)))
        self[-1] = batch

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # Batches are taken one at a time.
        start, end = self._bounds[index]
        assert self._all is not None
        # Pinned memory is copied while the device still computes; what follows on the device waits for the copy.
        return self._all[start:end].to(self._device, non_blocking=True)

    def __setitem__(self, index: int, batch: Tensor) -> None:
        start, end = self._bounds[index]
        assert self._all is not None
        self._all[start:end].copy_(batch, non_blocking=True)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    @property
    def bounds(self) -> Sequence[tuple[int, int]]:
        """The first sample of every batch, and the first behind it."""
        return self._bounds

    @property
    def device(self) -> torch.device:
        """Where they are computed with."""
        return self._device

    def like(self) -> "HiddenStates":
        """Room for other hidden states of the same samples."""
        return HiddenStates(self._samples, self._device, self._folder)

    def mapped(self, batches: Iterable[Tensor]) -> "HiddenStates":
        """Other hidden states of the same samples."""
        other = self.like()
        for batch in batches:
            other.append(batch)
        return other

    def copy(self) -> "HiddenStates":
        """The same hidden states in a place of their own."""
        return self.mapped(self)

    def split(self, batch_size: int) -> "HiddenStates":
        """The same hidden states in batches of another size."""
        other = self.like()
        other._all = self._all
        other._bounds = [
            (start, min(start + batch_size, self._samples)) for start in range(0, self._samples, batch_size)
        ]
        return other

    def write(self, file: BinaryIO) -> None:
        """Writes the bare bytes, a batch at a time."""
        for batch in self:
            file.write(batch.contiguous().cpu().view(torch.uint8).numpy().data)

    def read(self, file: BinaryIO) -> None:
        """Reads what `write` wrote of the same samples."""
        for index in range(len(self)):
            batch = torch.empty_like(self[index], device="cpu")
            found = file.readinto(batch.view(torch.uint8).numpy().data)  # type: ignore[attr-defined]  # Of a binary file.
            if found != batch.nbytes:
                raise NumpruneError(f"{file.name} is truncated: remove it and run again to begin anew.")
            # By way of the device, behind what was asked of it before: that may still be on its way to the same memory.
            self[index] = batch.to(self._device)

    def _room(self, batch: Tensor) -> Tensor:
        shape = (self._samples, *batch.shape[1:])
        size = self._samples * batch[0].numel() * batch.element_size()
        place = place_for(size, self._device)
        if place == "device":
            return torch.empty(shape, dtype=batch.dtype, device=self._device)
        if place == "memory":
            return torch.empty(shape, dtype=batch.dtype, pin_memory=self._device.type == "cuda")
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            try:
                # A mapped file that meets a full disk ends the process; this asks before.
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise NumpruneError(
                    f"{Path(file.name).parent}: hidden states of {size:,} bytes fit neither memory nor this disk "
                    f"({error.strerror}): free some, or use fewer calibration samples."
                ) from None
            return torch.from_file(file.name, shared=True, size=size // batch.element_size(), dtype=batch.dtype).view(
                shape
            )
