"""The commands as people type them."""

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from numprune.errors import NumpruneError
from tasks.publish import publish
from tasks.registry.commands import app
from tests.tasks.conftest import MODEL, Workspace


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def versions(workspace: Workspace) -> Workspace:
    """A version, and a slower one."""
    publish(MODEL, "0.2")
    workspace.make_results(seed=1, speed=5.0)
    publish(MODEL, "0.2")
    return workspace


def test_life_of_a_version(versions: Workspace) -> None:
    done = run("promote", f"{MODEL}/1", "--dry-run")
    assert done.exit_code == 0
    assert "small version 1 would become the champion; nothing was changed." in done.output
    done = run("promote", f"{MODEL}/1", "--by", "ada", "--reason", "first")
    assert done.exit_code == 0
    assert "small version 1 is the champion; there was none." in done.output
    assert "at most 1.1" in done.output
    done = run("promote", f"{MODEL}/1")
    assert (done.exit_code, done.output) == (0, "small version 1 is the champion already.\n")
    done = run("promote", MODEL)
    assert done.exit_code == 1
    assert "worse in tokens_per_second, better in nothing" in done.output
    assert "small version 2 is refused: version 1 was the champion, and nothing was changed." in done.output
    versions.edit_parameters("promotion", undominated=False)
    assert run("promote", MODEL).exit_code == 0
    done = run("rollback", MODEL, "--reason", "too slow")
    assert done.exit_code == 0
    assert "small version 1 is the champion; before it was version 2." in done.output
    done = run("versions", MODEL)
    assert done.exit_code == 0
    rows = [line for line in done.output.splitlines() if MODEL in line]
    assert ["candidate" in row for row in rows] == [True, False]
    assert ["champion" in row for row in rows] == [False, True]
    assert "1.05" in rows[1]
    assert "numprune-promotions" not in run("versions").output


def test_pull_from_a_folder_without_parameters(
    versions: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run("promote", f"{MODEL}/1").exit_code == 0
    address = versions.client.tracking_uri
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = run("pull", f"{MODEL}@champion", "-o", "out", "--registry", address)
    assert done.exit_code == 0, done.output
    assert "small version 1:" in done.output
    assert "Signatures were not checked" in done.output
    assert (Path("out") / "model.safetensors").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow sets it itself.
    assert "Where is the registry?" in str(run("pull", MODEL, "-o", "other").exception)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert run("pull", MODEL, "-o", "other").exit_code == 0
    # The key of a version that nobody signed.
    refused = run("pull", MODEL, "-o", "third", "--public-key", "key.pem")
    assert isinstance(refused.exception, NumpruneError)
    assert not Path("third").exists()


def test_error_of_mlflow_is_one_message(versions: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    del versions
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    error = run("versions", "--registry", "http://127.0.0.1:9").exception
    assert isinstance(error, NumpruneError)
    assert str(error).startswith("MLflow: ")


def test_what_there_is_not(versions: Workspace) -> None:
    del versions
    error = run("versions", "nobody").exception
    assert str(error) == "The registry has no model 'nobody'; it has: small."
    assert "nothing to go back to" in str(run("rollback", MODEL).exception)
