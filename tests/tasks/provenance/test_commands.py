import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tasks.provenance.commands import app
from tests.tasks.provenance.conftest import Version


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def address(version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the registry; the commands run where there is no params.yaml."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return f"sqlite:///{version.root}/mlflow.db"


def test_verify_says_what_was_checked(version: Version, address: str) -> None:
    result = run("verify", "tiny", "--registry", address, "--signed", "--public-key", version.signing.public_key)
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1), result.output
    assert "17 files as stated, a valid signature; the registry and the log of promotions agree" in result.stdout
    folder = run("verify", version.folder)
    assert folder.exit_code == 0
    assert "a signature that was not checked: give --public-key; the registry was not asked" in folder.stdout


def test_verify_lists_what_disagrees(version: Version, address: str) -> None:
    (version.folder / "notes.txt").write_text("mine", encoding="utf-8")
    version.client.set_model_version_tag("tiny", "1", "perplexity", "1.0")
    result = run("verify", "tiny/1", "--registry", address)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "notes.txt is an extra file: the statement does not list it",
        *(line for line in result.stdout.splitlines() if line.startswith("the checkpoint: DVC's hash is")),
        "MLflow: tag perplexity is 1.0, but the statement says 240.3",
    ]


@pytest.mark.usefixtures("address")
def test_lineage_as_tree_json_and_picture(version: Version, tmp_path: Path) -> None:
    tree = run("lineage", version.folder, "--picture", tmp_path / "lineage.svg")
    assert tree.exit_code == 0
    assert "prefect_flow_run: 1f0c" in tree.stdout
    assert (tmp_path / "lineage.svg").exists()
    told = json.loads(run("lineage", version.folder, "--json").stdout)
    assert told["subject"]["model"] == "tiny"


def test_lineage_of_an_alias(version: Version, address: str) -> None:
    told = json.loads(run("lineage", "tiny@champion", "--json", "--registry", address).stdout)
    assert told["subject"]["registered"] == f"tiny version {version.registered.version}"
    assert [entry["action"] for entry in told["promotions"]] == ["promote", "rollback"]
