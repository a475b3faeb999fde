"""What a consumer gets, and what is refused."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from numprune.errors import NumpruneError
from tasks.parameters import Signing
from tasks.publish import publish
from tasks.registry import version_folder
from tasks.registry.promote import promote
from tasks.registry.pull import pull
from tests.tasks.conftest import MODEL

REFERENCE = f"{MODEL}@champion"


@pytest.fixture
def champion(client: MlflowClient) -> Path:
    """The stored files of a champion."""
    publish(MODEL, "0.2")
    promote(MODEL)
    return version_folder.local_folder(client, client.get_model_version(MODEL, "1"), Path("unused"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_is_the_version_and_may_be_edited(client: MlflowClient, champion: Path) -> None:
    pulled = pull(client, REFERENCE, Path("here/out"), Signing())
    assert (pulled.model, pulled.version) == (MODEL, 1)
    assert contents(Path("here/out")) == contents(champion)
    assert pulled.files == len(contents(champion))
    assert all(path.stat().st_nlink == 1 for path in Path("here/out").rglob("*") if path.is_file())
    before = (champion / "config.json").read_bytes()
    (Path("here/out") / "config.json").write_text("{}", encoding="utf-8")
    assert (champion / "config.json").read_bytes() == before
    assert [path.name for path in Path("here").iterdir()] == ["out"]


def test_model_alone_is_its_champion(client: MlflowClient, champion: Path) -> None:
    del champion
    assert pull(client, MODEL, Path("out"), Signing()).version == 1


def test_mark_of_an_mlflow_download_is_not_pulled(client: MlflowClient, champion: Path) -> None:
    download_artifacts(f"models:/{REFERENCE}")
    assert (champion / version_folder.DOWNLOAD_MARK).exists()
    pull(client, REFERENCE, Path("out"), Signing())
    assert not (Path("out") / version_folder.DOWNLOAD_MARK).exists()


def test_changed_version_does_not_appear(client: MlflowClient, champion: Path) -> None:
    (champion / "tokenizer.json").unlink()
    (champion / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(NumpruneError, match=r"cannot be trusted; here/out was not written:\n.*tokenizer\.json"):
        pull(client, REFERENCE, Path("here/out"), Signing())
    assert list(Path("here").iterdir()) == []


def test_forged_champion_does_not_appear(client: MlflowClient, champion: Path) -> None:
    del champion
    client.set_registered_model_alias(MODEL, "previous", "1")
    with pytest.raises(NumpruneError, match="the alias previous points at version 1"):
        pull(client, REFERENCE, Path("out"), Signing())
    assert not Path("out").exists()


def test_taken_folder_is_refused(client: MlflowClient, champion: Path) -> None:
    del champion
    Path("out").mkdir()
    (Path("out") / "mine").touch()
    with pytest.raises(NumpruneError, match="already holds something"):
        pull(client, REFERENCE, Path("out"), Signing())
    (Path("out") / "mine").unlink()
    pull(client, REFERENCE, Path("out"), Signing())  # An empty one is as good as none.


def test_signature_can_be_required(client: MlflowClient, champion: Path) -> None:
    del champion
    with pytest.raises(NumpruneError, match=r"model\.sig"):
        pull(client, REFERENCE, Path("out"), Signing(), signature_required=True)


def test_missing_files_in_the_store(client: MlflowClient, champion: Path) -> None:
    shutil.rmtree(champion)
    with pytest.raises((NumpruneError, FileNotFoundError)):
        pull(client, REFERENCE, Path("out"), Signing())
    assert not Path("out").exists()
