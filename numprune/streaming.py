"""Models larger than memory: a decoder block's weights are read when its turn comes, and forgotten after it.

A model that is opened this way has its embeddings, its last norm and its head; its blocks stand on the meta device and
know where their tensors lie. `visit` goes through the blocks of any model: while one is computed with, a thread reads
the next and, on a GPU, copies it through pinned memory on a stream of its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.architectures import decoder_blocks
from numprune.errors import NumpruneError
from numprune.memory import is_out_of_memory, return_unused_memory


@dataclass(frozen=True)
class StoredTensors:
    """Where tensors lie that are not in memory.

    Attributes:
        files: File and key of each tensor, by its name inside the block.
        dtype: In which it is computed with.
    """

    files: Mapping[str, tuple[Path, str]]
    dtype: torch.dtype
    _checked: set[str] = field(default_factory=set, compare=False, repr=False)

    def __deepcopy__(self, _memo: dict[int, Any]) -> "StoredTensors":
        return self

    def read(self, *, pinned: bool = False) -> dict[str, Tensor]:
        """Reads the tensors into memory of their own; what is read for the first time is checked.

        Args:
            pinned: Into memory that a GPU copies from by itself; the check is then left to `check`, on the GPU.

        Raises:
            NumpruneError: If a file is missing, truncated or damaged, or a value is NaN or infinite.
        """
        tensors = {}
        for path in sorted({path for path, _ in self.files.values()}):
            try:
                with safe_open(path, "pt") as file:
                    for name, (where, key) in self.files.items():
                        if where == path:
                            # Copied: pages of a mapped file would be read, and counted, where they are computed with.
                            tensors[name] = _copied(file.get_tensor(key), self.dtype, pinned=pinned)
            except (OSError, SafetensorError) as error:
                raise NumpruneError(f"{path} is missing, truncated or damaged ({error}): fetch it again.") from None
        if not pinned:
            self.check(tensors)
        return tensors

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Looks at what was read for the first time.

        Raises:
            NumpruneError: If a value is NaN or infinite.
        """
        for name in tensors.keys() - self._checked:
            if not is_finite(tensors[name]):
                path, key = self.files[name]
                raise NumpruneError(f"{path}: {key} holds NaN or infinite values: the checkpoint is damaged.")
            self._checked.add(name)


def _copied(tensor: Tensor, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype, pin_memory=pinned).copy_(tensor)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass and without a tensor of the same size."""
    # NaN is both the least and the most.
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def stored(block: nn.Module) -> StoredTensors | None:
    """Where a block's tensors lie; None if the block is in memory."""
    return getattr(block, "stored", None)


def is_streamed(blocks: Iterable[nn.Module]) -> bool:
    """Whether any of the blocks is read when its turn comes."""
    return any(stored(block) for block in blocks)


def store(block: nn.Module, files: Mapping[str, tuple[Path, str]]) -> None:
    """Lets go of a block's tensors, which lie in files from now on."""
    tensors = block.state_dict()
    dtype = next((tensor.dtype for tensor in tensors.values()), torch.float32)
    setattr(block, "stored", StoredTensors(files, dtype))  # noqa: B010 - No attribute of every module.
    _release(block)


def forget(block: nn.Module) -> None:
    """Makes a block that is in memory independent of where its tensors came from."""
    if stored(block):
        delattr(block, "stored")


def visit(blocks: Iterable[nn.Module], device: torch.device, *, first: int = 0) -> Iterator[tuple[int, nn.Module]]:
    """Yields the index of each block and the block on the compute device, where it is until the next one is asked for.

    Args:
        blocks: Of a model; they may be replaced in its list meanwhile.
        device: Where to compute.
        first: Index of the block to begin with.

    Raises:
        NumpruneError: If a stored block cannot be read or is damaged.
    """
    blocks = list(blocks)
    copies = torch.cuda.Stream(device) if device.type == "cuda" and is_streamed(blocks) else None
    with ThreadPoolExecutor(1, "read-block") as reader:

        def begin(index: int) -> "Future[_Fetched] | None":
            tensors = stored(blocks[index]) if index < len(blocks) else None
            copy = _Copy(copies, torch.cuda.current_stream(device).record_event()) if copies else None
            return reader.submit(_fetch, tensors, device, copy) if tensors else None

        ahead = begin(first)
        for index in range(first, len(blocks)):
            block, fetched, ahead = blocks[index], ahead, None
            tensors = _unless_full(fetched) if fetched else None
            if fetched and not tensors:
                # Beside the block before and a batch in it there was no room. Both are gone now.
                fetched = None
                fetched = begin(index)
                tensors = fetched.result() if fetched else None
            ahead = begin(index + 1)
            with _present(block, tensors, device):
                fetched = tensors = None  # From here on, only the block holds on to them.
                yield index, block
            del block
            if stored(blocks[index]):
                return_unused_memory()


def outside_to(model: PreTrainedModel, device: torch.device) -> None:
    """Moves what is outside the decoder blocks: embeddings, norms, the head."""
    inside = {id(module) for module in decoder_blocks(model).modules()}
    for module in model.modules():
        if id(module) not in inside:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)


@contextmanager
def answering(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Lets a streamed model answer as a whole, as for generation: every call of a block reads it.

    Each forward pass reads the whole model once; it is for what no loop over blocks can do.
    """
    outside_to(model, device)
    hooks = []
    for block in decoder_blocks(model):
        if (tensors := stored(block)) is not None:

            def enter(block: nn.Module, _inputs: Any, tensors: StoredTensors = tensors) -> None:
                _adopt(block, _fetch(tensors, device, None), device)

            hooks.append(block.register_forward_pre_hook(enter))
            hooks.append(block.register_forward_hook(lambda block, _inputs, _output: _release(block), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _Copy:
    """How a block comes to a GPU.

    Attributes:
        stream: Of the copies; what is computed meanwhile is on another one.
        room: What the GPU must have come to before. Until then it may compute with the block before the last, whose
            memory is not free, however far the program is ahead.
    """

    stream: "torch.cuda.Stream"
    room: "torch.cuda.Event"


@dataclass
class _Fetched:
    """Tensors on the device, and the event after which they are complete there."""

    tensors: dict[str, Tensor]
    complete: "torch.cuda.Event | None" = None


@contextmanager
def _present(block: nn.Module, fetched: _Fetched | None, device: torch.device) -> Iterator[None]:
    if fetched is None:
        home = next((parameter.device for parameter in block.parameters()), device)
        block.to(device)
        try:
            yield
        finally:
            block.to(home)
        return
    _adopt(block, fetched, device)
    fetched.tensors.clear()
    try:
        yield
    finally:
        _release(block)


def _fetch(tensors: StoredTensors, device: torch.device, copy: _Copy | None) -> _Fetched:
    if copy is None:
        return _Fetched({name: tensor.to(device) for name, tensor in tensors.read().items()})
    with torch.cuda.stream(copy.stream):  # Its device becomes this thread's, which begins with the first one.
        found = tensors.read(pinned=True)
        copy.room.synchronize()
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in found.items()}
        tensors.check(moved)
        return _Fetched(moved, copy.stream.record_event())


def _unless_full(fetched: "Future[_Fetched]") -> _Fetched | None:
    """What was fetched, or None if memory did not suffice."""
    try:
        return fetched.result()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


def _adopt(block: nn.Module, fetched: _Fetched, device: torch.device) -> None:
    if fetched.complete is not None:
        computing = torch.cuda.current_stream(device)
        computing.wait_event(fetched.complete)
        for tensor in fetched.tensors.values():
            tensor.record_stream(computing)  # Its memory is not given to the next copy while this stream reads it.
    block.load_state_dict(fetched.tensors, assign=True)
    block.to(device)  # Buffers that no file holds.


def _release(block: nn.Module) -> None:
    block.load_state_dict({name: tensor.to("meta") for name, tensor in block.state_dict().items()}, assign=True)
