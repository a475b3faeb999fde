"""Work that goes on where it stopped: by an error, by Ctrl-C or by `kill -9`.

Unfinished work lies in a folder beside its result, named by a hash of all that it depends on. What is done of it is
there under its final name; hidden states are saved now and then, so that no layer has to be computed twice.
"""

import glob
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from numprune.memory import HiddenStates
from numprune.ranks import agreed, held_by_all, is_first, meet, rank, ranks

# Saving takes at most this share of the time.
_SHARE = 0.05
# Of the hash in a work folder's name.
_DIGITS = 16


@contextmanager
def unfinished(result: Path, **depends_on: Any) -> Iterator[Path]:
    """Yields the work folder of a result; it stays after an error, if there is anything in it, and goes after success.

    Work of the same result that depended on something else is removed first. A folder `result` in the work folder
    takes the place of the result at the end.

    Args:
        result: File or folder that is going to be made.
        depends_on: Everything that decides what comes out, in what JSON can say; paths stand for files, which are
            known by their size and time. The code, the library versions and the number of ranks are added.
    """
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    facts = {**depends_on, **versions, "code": _code(), "ranks": ranks()}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=_known_by).encode()).hexdigest()[:_DIGITS]
    folder = result.with_name(f".{result.name}.{digest}.work")
    if is_first():
        # All digits: `.model.v2.HASH.work` is that of another result.
        for other in result.parent.glob(f".{glob.escape(result.name)}.{'[0-9a-f]' * _DIGITS}.work"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
    meet()
    try:
        yield folder
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # Refuses unless it is empty.
        raise
    meet()
    if is_first():
        if (folder / "result").exists():
            if result.exists():
                shutil.rmtree(result)
            (folder / "result").replace(result)
        shutil.rmtree(folder)


def _known_by(value: Any) -> Any:
    """A file, or those of a folder, by names, sizes and times; anything else as text."""
    if not isinstance(value, Path):
        return str(value)
    files = sorted(value.iterdir()) if value.is_dir() else [value]
    stats = ((str(file), file.stat()) for file in files if file.is_file())
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _code() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class Saved:
    """Hidden states before a block, in a work folder; without a folder nothing is saved and all begins at block 0."""

    def __init__(self, folder: Path | None, name: str) -> None:
        """Finds what a run before has saved under a name."""
        self._folder = folder
        # Each rank has samples, and so files, of its own.
        self._prefix = f"{name}.{rank()}-of-{ranks()}."
        self._first, self._due = 1, 0.0

    def load(self, states: Sequence[HiddenStates], *, most: int | None = None) -> int:
        """Puts the saved hidden states in place of those before block 0; returns the block that they are before.

        Args:
            states: Those before block 0, in the same order as they were saved.
            most: Of no later block.
        """
        found = {self._block(path) for path in self._files() if most is None or self._block(path) <= most}
        block = max(held_by_all(found), default=0)
        if block:
            with self._path(block).open("rb") as file:
                for of_stream in states:
                    of_stream.read(file)
        self._first = block + 1
        return block

    def save(self, block: int, states: Sequence[HiddenStates], *, before: Callable[[], object] = lambda: None) -> None:
        """Saves the hidden states before a block, unless that was done too short a time ago.

        `before` is called first: a run goes on at that block, so what comes of those before has to be there.
        """
        if self._folder is None or block < self._first or not agreed(time.monotonic() >= self._due):
            return
        before()
        start = time.monotonic()
        with writing(self._folder), replace_on_success(self._path(block)) as temporary, temporary.open("wb") as file:
            for of_stream in states:
                of_stream.write(file)
        meet()  # Until all ranks have the new files, the old ones are what they have in common.
        for path in self._files():
            if path != self._path(block):
                path.unlink()
        now = time.monotonic()
        self._due = now + (now - start) / _SHARE

    def _files(self) -> list[Path]:
        return list(self._folder.glob(f"{self._prefix}*.states")) if self._folder else []

    def _path(self, block: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._prefix}{block:04d}.states"

    @staticmethod
    def _block(path: Path) -> int:
        return int(path.suffixes[-2].removeprefix("."))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Says what to do where a disk is full.

    Raises:
        NumpruneError: If a file cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise NumpruneError(
            f"{folder} cannot be written: {error}. What is done stays there: free some space and run again to go on."
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Says which file it is that cannot be read.

    Raises:
        NumpruneError: If the file is truncated or damaged.
    """
    try:
        yield
    except SafetensorError as error:
        raise NumpruneError(f"{path} is truncated or damaged ({error}): remove it and run again.") from error
