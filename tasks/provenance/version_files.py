"""The files of a version folder: their names, and their digests. Nothing outside the folder is ever read."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numprune.errors import NumpruneError

EVIDENCE = "provenance"
STATEMENT = f"{EVIDENCE}/statement.json"
BOM = f"{EVIDENCE}/bom.cdx.json"
PARAMETERS = f"{EVIDENCE}/params.yaml"
LOCK = f"{EVIDENCE}/dvc.lock"
EVALUATION = f"{EVIDENCE}/evaluation.json"
DENSE_EVALUATION = f"{EVIDENCE}/dense_evaluation.json"
BENCHMARK = f"{EVIDENCE}/benchmark.json"
CARD = "README.md"
SIGNATURE = "model.sig"
# MLflow writes it into whatever it downloads as models:/..., and nobody can have signed it before.
DOWNLOAD_MARK = "registered_model_meta"

# The statement lists all files but itself, and the signature covers the statement.
UNLISTED = (STATEMENT, SIGNATURE, DOWNLOAD_MARK)

_ADDED_FILES = (CARD, SIGNATURE, DOWNLOAD_MARK, "MLmodel")
_ADDED_FOLDERS = (EVIDENCE, "serving")


@dataclass(frozen=True)
class Digests:
    """SHA-256 for statements and signatures, MD5 because DVC's hashes are made of it; both in hexadecimal digits."""

    sha256: str
    md5: str
    size: int


@dataclass(frozen=True)
class Irregular:
    """What is in a folder and is no plain file: a link, a pipe, a device."""

    name: str
    kind: str


def read_digests(folder: Path) -> tuple[dict[str, Digests], list[Irregular]]:
    """Digests of all plain files of a folder by their path in it, and what is no plain file. Links are not followed."""
    digests: dict[str, Digests] = {}
    irregular: list[Irregular] = []
    for entry in _walk(folder):
        name = Path(entry.path).relative_to(folder).as_posix()
        if entry.is_symlink():
            irregular.append(Irregular(name, f"a link to {os.readlink(entry.path)}"))  # noqa: PTH115  # Entry is text.
        elif entry.is_file(follow_symlinks=False):
            digests[name] = digest_file(Path(entry.path))
        else:
            irregular.append(Irregular(name, "neither a file nor a folder"))
    return digests, irregular


def model_digests(folder: Path) -> dict[str, Digests]:
    """Digests of a source model's files, in the form in which DVC sees them: links followed, its card left out."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / CARD)
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in sorted(paths)}


def digest_file(path: Path) -> Digests:
    """Both digests of a file, which is read once."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            md5.update(block)
            size += len(block)
    return Digests(sha256.hexdigest(), md5.hexdigest(), size)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        NumpruneError: If the file is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NumpruneError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise NumpruneError(f"{path.name} is no JSON object.")
    return content


def dvc_folder_hash(md5_by_name: Mapping[str, str]) -> str:
    """The hash that DVC gives a folder: of the sorted list of its files."""
    listing = [{"md5": md5, "relpath": name} for name, md5 in sorted(md5_by_name.items())]
    return hashlib.md5(json.dumps(listing).encode(), usedforsecurity=False).hexdigest() + ".dir"


def is_checkpoint_file(name: str) -> bool:
    """Whether a file comes from the stage `compensate`, rather than from registration."""
    return name not in _ADDED_FILES and name.partition("/")[0] not in _ADDED_FOLDERS


def is_weights(name: str) -> bool:
    """Whether a file holds weights of the checkpoint."""
    return name.endswith(".safetensors") and "/" not in name


def _walk(folder: Path) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path))
            else:
                yield entry
