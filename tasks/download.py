"""Fetch one exact state of a model, from the Hugging Face Hub or another folder; only safetensors, never pickles."""

import hashlib
import os
import shutil
from pathlib import Path

from numprune.checkpoint import weight_files
from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from tasks.layout import model_folder
from tasks.parameters import Download, load_parameters
from tasks.step import run_step

# Python files are left out as well: nothing that is fetched is executed.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")

# Subfolders and `consolidated` files hold the same weights in other formats.
LEFT_OUT = ("*/*", "consolidated*")


def download(name: str) -> None:
    """Fetches the model `downloads.<name>` of params.yaml into `models/<name>`.

    Raises:
        NumpruneError: If params.yaml has no such download, it cannot be had, is in another state than the revision
            says, or has no safetensors weights.
    """
    downloads = load_parameters().downloads
    if name not in downloads:
        raise NumpruneError(f"params.yaml has no downloads.{name}; it has: {', '.join(downloads) or 'none'}.")
    source = downloads[name]
    with replace_on_success(model_folder(name)) as temporary:
        if source.folder is not None:
            _copy(Path(source.folder), temporary, source, name)
        else:
            _fetch(temporary, source, name)
        if not any(temporary.glob("*.safetensors")):
            raise NumpruneError(
                f"downloads.{name}: {source.origin} has no .safetensors weights at {source.revision}; pickled "
                "weights are refused because loading them can run any code. Choose a revision with safetensors."
            )


def _fetch(target: Path, source: Download, name: str) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(
            source.origin,
            revision=source.revision,
            local_dir=target,
            allow_patterns=list(FILES),
            ignore_patterns=list(LEFT_OUT),
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise NumpruneError(
            f"downloads.{name}: cannot fetch {source.origin} at {source.revision}: {error}\nCheck the name and "
            "the commit; a gated model needs its licence accepted and a token from `hf auth login`."
        ) from None
    # The client's own notes hold times; with them the same model would be another one.
    shutil.rmtree(target / ".cache", ignore_errors=True)


def _copy(origin: Path, target: Path, source: Download, name: str) -> None:
    if not origin.is_dir():
        raise NumpruneError(f"downloads.{name}: {origin} is no folder.")
    target.mkdir()
    for path in _carried(origin):
        shutil.copyfile(path, target / path.name)
    found = folder_revision(target)
    if found != source.revision:
        raise NumpruneError(
            f"downloads.{name}: {origin} is not what was announced: its SHA-256 is {found}, not {source.revision}. "
            "It was changed since, or is still being written."
        )


def folder_revision(folder: Path) -> str:
    """SHA-256 over the names and contents of all files of a model folder that would be fetched.

    Raises:
        NumpruneError: If weights are missing or truncated, or there are only pickles.
    """
    weight_files(folder)
    digest = hashlib.sha256()
    for path in _carried(folder):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _carried(folder: Path) -> list[Path]:
    paths = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in paths if not any(path.match(pattern) for pattern in LEFT_OUT[1:]))


if __name__ == "__main__":
    run_step(download)
