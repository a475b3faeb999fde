"""The folder of a registered version: how it is put together, kept in MLflow, and found again."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from numprune.files import replace_on_success

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

SERVING_FOLDER = "serving"
SERVING_MODULE = "numprune_serving"
# MLflow writes it into every version that it downloads, into the stored files themselves where they are on this disk.
DOWNLOAD_MARK = "registered_model_meta"

# Folders on their way to a store elsewhere; git and DVC leave it alone.
_STAGING = Path(".numprune/staging")


def assemble(folder: Path, checkpoint: Path, *, model_id: str, run_id: str) -> None:
    """Fills an empty folder with a checkpoint and with what MLflow needs to serve it.

    Args:
        folder: Where to.
        checkpoint: As the stage `compensate` left it.
        model_id: Of the MLflow model whose files these are.
        run_id: Of the MLflow run that holds its metrics.
    """
    for path in sorted(checkpoint.rglob("*")):
        target = folder / path.relative_to(checkpoint)
        if path.is_dir():
            target.mkdir()
        else:
            _link_or_copy(path, target)
    (folder / SERVING_FOLDER).mkdir()
    shutil.copyfile(Path(__file__).with_name("serving.py"), folder / SERVING_FOLDER / f"{SERVING_MODULE}.py")
    _write_mlmodel(folder, model_id=model_id, run_id=run_id)


@contextmanager
def stored_folder(client: "MlflowClient", model: "LoggedModel", name: str) -> Iterator[Path]:
    """Yields an empty folder that becomes the files of an MLflow model if no error occurs.

    Where MLflow keeps files on this disk, the folder is renamed into place, links included; elsewhere it is uploaded.

    Args:
        client: Of the registry.
        model: Still without files.
        name: Of the folder while it is being written; two at once must not have the same.
    """
    place = local_path(model.artifact_location)
    if place is not None:
        with replace_on_success(place) as temporary:
            temporary.mkdir()
            yield temporary
        return
    temporary = _STAGING / name
    shutil.rmtree(temporary, ignore_errors=True)  # Left by a crash.
    temporary.mkdir(parents=True)
    try:
        yield temporary
        client.log_model_artifacts(model.model_id, str(temporary))
    finally:
        shutil.rmtree(temporary)


def local_folder(client: "MlflowClient", version: "ModelVersion", target: Path) -> Path:
    """The files of a version: where MLflow keeps them if that is on this disk, else downloaded below `target`."""
    address = client.get_model_version_download_uri(version.name, version.version)
    place = local_path(address)
    if place is not None:
        return place
    from mlflow.artifacts import download_artifacts

    # Not as models:/, which would leave MLflow's mark among the files.
    return Path(download_artifacts(artifact_uri=address, dst_path=str(target)))


def local_path(address: str) -> Path | None:
    """The folder on this disk that an address of MLflow names, or None if it is elsewhere."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    return Path(local_file_uri_to_path(address)) if is_local_uri(address) else None


def _link_or_copy(source: Path, target: Path) -> None:
    source = source.resolve()  # DVC may have linked it symbolically.
    # DVC takes the right to write from files that it shares with its cache, so that they stay what they are. Any other
    # file may be edited in place, and a link would let the version change with it.
    if not source.stat().st_mode & 0o222:
        with contextlib.suppress(OSError):  # Another disk, or no links there.
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def _write_mlmodel(folder: Path, *, model_id: str, run_id: str) -> None:
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        # Without a name, because MLflow takes no plain list for a column that has one.
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, 64),
                ParamSpec("temperature", DataType.double, 0.0),
                ParamSpec("top_p", DataType.double, 1.0),
            ]
        ),
    )
    model = Model(model_id=model_id, run_id=run_id, signature=signature)
    pyfunc.add_to_model(model, loader_module=SERVING_MODULE, code=SERVING_FOLDER)
    model.save(folder / "MLmodel")
