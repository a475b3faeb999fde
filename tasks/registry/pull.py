"""Fetch a registered version into a folder that appears only when everything in it is proved."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from numprune.checkpoint import check_output, check_space
from numprune.errors import NumpruneError
from tasks.parameters import Signing
from tasks.provenance.verify import verify_version
from tasks.registry.promotion_log import CHAMPION
from tasks.registry.references import resolve
from tasks.registry.version_folder import DOWNLOAD_MARK, local_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Pulled:
    """A version in a folder.

    Attributes:
        model: The registered model.
        version: Its number.
        files: How many there are in the folder.
    """

    model: str
    version: int
    files: int


def pull(
    client: "MlflowClient", reference: str, output: Path, signing: Signing, *, signature_required: bool = False
) -> Pulled:
    """Copies the files of a version to a folder, after checking every one of them.

    Args:
        client: Of the registry.
        reference: MODEL, which stands for MODEL@champion, MODEL@alias or MODEL/3.
        output: The folder; it must not hold anything yet, and appears only if nothing is wrong.
        signing: With the public key to check signatures by, if there is one.
        signature_required: Whether a version without signature is refused.

    Raises:
        NumpruneError: If there is no such version, the folder is taken or the disk full, or anything about the version
            does not agree with its record; nothing is left behind.
    """
    version = resolve(client, reference, default=CHAMPION)
    check_output(output)
    check_space(output, int(version.tags.get("checkpoint_bytes", 0)))
    output.parent.mkdir(parents=True, exist_ok=True)
    # What is checked is the copy: the registry's files may be others a moment later.
    with tempfile.TemporaryDirectory(prefix=".numprune-", dir=output.parent) as temporary:
        folder = _copy(client, version, Path(temporary))
        wrong = verify_version(client, version, folder, signing, signature_required=signature_required)
        if wrong:
            lines = [f"{version.name} version {version.version} cannot be trusted; {output} was not written:"]
            raise NumpruneError("\n".join([*lines, *(f"  {disagreement}" for disagreement in wrong)]))
        files = sum(path.is_file() for path in folder.rglob("*"))
        folder.replace(output)
    return Pulled(version.name, int(version.version), files)


def _copy(client: "MlflowClient", version: "ModelVersion", target: Path) -> Path:
    place = local_folder(client, version, target)
    if place.is_relative_to(target.resolve()):
        return place  # Downloaded.
    # No hard links: what is pulled may be edited, the registry's files may not. Symbolic links stay what they are, for
    # the check to find.
    copy = target / "version"
    ignored = shutil.ignore_patterns(DOWNLOAD_MARK)
    shutil.copytree(place, copy, symlinks=True, ignore=ignored, copy_function=shutil.copyfile)
    return copy
