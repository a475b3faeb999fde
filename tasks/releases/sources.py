"""Where new releases of source models are found: a folder, an owner on the Hugging Face Hub, a feed."""

import fnmatch
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import urlopen

from pydantic import ValidationError

from numprune.errors import NumpruneError
from tasks.download import folder_revision
from tasks.parameters import Download, FeedSource, FolderSource, HubSource, Source, Watch

# A list of releases is text of a few kilobytes; what is larger or slower is no feed.
FEED_BYTES = 1_000_000
FEED_SECONDS = 30.0

# Tracked folders below models/ belong to the repository.
_RESERVED = "reference-"

Log = logging.Logger | logging.LoggerAdapter[Any]
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Release:
    """One exact revision of a source model."""

    name: str
    """What it is called in the pipeline and in the registry: a safe folder name."""
    download: Download
    """Where this state of it is fetched from."""

    @property
    def revision(self) -> str:
        """The Hub's commit, or the SHA-256 of the folder's model."""
        return self.download.revision


class ReleaseSource(Protocol):
    """Anything that can be asked for releases."""

    def releases(self) -> Iterable[Release]:
        """The newest release of every model there is now; old ones are listed again each time."""


@dataclass(frozen=True)
class FolderReleases:
    """Every model folder below a folder, once nothing in it has changed for a while."""

    source: FolderSource
    settle_seconds: float
    revision: Callable[[Path], str] = folder_revision
    log: Log = _LOG

    def releases(self) -> Iterator[Release]:
        """What is incomplete or broken is logged and left out.

        Raises:
            NumpruneError: If the watched folder does not exist.
        """
        root = Path(self.source.path).expanduser().resolve()
        if not root.is_dir():
            raise NumpruneError(f"watch.sources: {root} is no folder.")
        for folder in sorted(root.iterdir()):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            if not fnmatch.fnmatchcase(folder.name, self.source.pattern):
                continue
            try:
                if self._is_settled(folder):
                    yield Release(safe_name(folder.name), Download(folder=str(folder), revision=self.revision(folder)))
                else:
                    self.log.info("%s changed within %g s: it may still be written.", folder, self.settle_seconds)
            except (NumpruneError, OSError, ValueError) as error:
                self.log.warning("%s is left out: %s", folder, error)

    def _is_settled(self, folder: Path) -> bool:
        # The time of the change of the entry itself: a copy can bring modification times of last year with it.
        changed = max(path.stat().st_ctime for path in (folder, *folder.iterdir()))
        return time.time() - changed >= self.settle_seconds


@dataclass(frozen=True)
class HubReleases:
    """The newest commit of every model of an owner on the Hugging Face Hub that has weights in safetensors."""

    source: HubSource
    endpoint: str | None = None
    """Of the Hub; None: as HF_ENDPOINT says, or the public one."""
    log: Log = _LOG

    def releases(self) -> Iterator[Release]:
        """Asks the Hub; private models are seen with the token of `hf auth login`.

        Raises:
            NumpruneError: If the Hub cannot be asked.
        """
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from httpx import HTTPError
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            found = list(
                HfApi(endpoint=self.endpoint).list_models(
                    author=self.source.owner, filter="safetensors", expand=["sha"]
                )
            )
        except (HfHubHTTPError, HTTPError) as error:
            raise NumpruneError(f"watch.sources: cannot list the models of {self.source.owner}: {error}") from None
        for model in found:
            if not fnmatch.fnmatchcase(model.id.rpartition("/")[2], self.source.pattern):
                continue
            try:
                yield hub_release(model.id, str(model.sha))
            except (NumpruneError, ValueError) as error:
                self.log.warning("%s is left out: %s", model.id, error)


@dataclass(frozen=True)
class FeedReleases:
    """A JSON list of releases at an address."""

    source: FeedSource
    log: Log = _LOG
    max_bytes: int = field(default=FEED_BYTES)
    seconds: float = field(default=FEED_SECONDS)

    def releases(self) -> Iterator[Release]:
        """An entry that is wrong is logged and left out.

        Raises:
            NumpruneError: If the feed cannot be read, is too large or is no JSON list.
        """
        try:
            entries = json.loads(self._read())
        except (OSError, ValueError) as error:
            raise NumpruneError(f"watch.sources: cannot read {self.source.url}: {error}") from None
        if not isinstance(entries, list):
            raise NumpruneError(f"watch.sources: {self.source.url} is no JSON list.")
        for entry in entries:
            try:
                name = entry["name"]
                origin = {key: value for key, value in entry.items() if key != "name"}
                yield Release(safe_name(str(name)), Download.model_validate(origin))
            except (KeyError, TypeError, AttributeError, ValueError, NumpruneError) as error:
                self.log.warning("%s: an entry is left out: %s", self.source.url, _mistakes(error))

    def _read(self) -> bytes:
        if urlsplit(self.source.url).scheme not in {"http", "https", "file"}:
            raise ValueError("the address must begin with http://, https:// or file://")
        deadline = time.monotonic() + self.seconds
        content = b""
        with urlopen(self.source.url, timeout=self.seconds) as response:  # noqa: S310 - the schemes are checked above.
            # The time limit of the connection counts from one byte to the next, hence one for the whole.
            while chunk := response.read1(65536):
                content += chunk
                if len(content) > self.max_bytes:
                    raise ValueError(f"it is larger than {self.max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise ValueError(f"it takes longer than {self.seconds:g} s")
        return content


def hub_release(repository: str, commit: str) -> Release:
    """A release of the Hub by repository (`owner/name`) and commit (40 hexadecimal digits).

    Raises:
        ValueError: If the commit is none.
    """
    return Release(safe_name(repository.replace("/", "--")), Download(repository=repository, revision=commit))


def safe_name(name: str) -> str:
    """A folder name that git, DVC and MLflow all take, without dots: DVC takes them for the levels of params.yaml.

    A dot becomes an underscore. Where other characters have to go, some digits of the hash of the whole name follow,
    so that names that differ in more than that stay different.

    Raises:
        NumpruneError: If nothing is left, or the name is one of the repository's own models.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name.replace(".", "_")).strip("-_")
    if not safe or safe.startswith(_RESERVED):
        raise NumpruneError(
            f"{name!r} cannot be the name of a release: choose another that does not begin with a sign "
            f"or with {_RESERVED!r}."
        )
    if safe != name.replace(".", "_"):
        safe += f"-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return safe


def find_releases(
    watch: Watch, *, revision: Callable[[Path], str] = folder_revision, log: Log = _LOG
) -> Iterator[Release]:
    """The releases of all sources of `params.yaml`; a source that fails is logged and does not stop the others.

    Args:
        watch: Names the sources.
        revision: Gives the revision of a model folder; one that remembers spares reading weights again.
        log: Takes what is left out and why.
    """
    for source in watch.sources:
        try:
            yield from _open(source, watch.settle_seconds, revision, log).releases()
        except Exception as error:  # Whatever it is, the other sources are asked.
            log.error("%s: %s", source.kind, error)


def _open(source: Source, settle_seconds: float, revision: Callable[[Path], str], log: Log) -> ReleaseSource:
    match source:
        case FolderSource():
            return FolderReleases(source, settle_seconds, revision, log)
        case HubSource():
            return HubReleases(source, log=log)
        case FeedSource():
            return FeedReleases(source, log=log)


def _mistakes(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
    return f"{type(error).__name__}: {error}"
