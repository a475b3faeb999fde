import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from numprune.errors import NumpruneError
from tasks.provenance.lineage import draw_lineage, folder_lineage, lineage_tree, version_lineage
from tasks.provenance.version_files import digest_file
from tests.tasks.provenance.conftest import BUDGETS, MODEL, Version


def test_lineage_of_a_version_names_everything_it_came_from(version: Version, workspace: Path) -> None:
    told = version_lineage(version.client, version.registered, version.folder)
    source = workspace / "models" / MODEL
    assert told.subject["registered"] == "tiny version 1"
    assert told.subject["aliases"] == ["champion", "ratio-0_3"]
    assert told.source["files"]["model.safetensors"] == digest_file(source / "model.safetensors").sha256
    assert "README.md" not in told.source["files"]
    assert told.calibration["data_md5"] == digest_file(workspace / "data/calibration.txt").md5
    assert (told.calibration["samples"], told.calibration["length"], told.calibration["seed"]) == (4, 32, 0)
    assert told.code["commit"] == version.registered.tags["git_commit"]
    assert told.code["changed_since_commit"] == "false"
    assert told.runs["mlflow"] == version.registered.run_id
    assert told.runs["prefect_flow_run"] == "1f0c"
    assert told.environment["packages"]["torch"]
    assert told.parameters["budgets"] == list(BUDGETS)
    assert told.results["evaluation"]["perplexity"] == 240.3
    assert [(entry["action"], entry["by"]) for entry in told.promotions] == [("promote", "ann"), ("rollback", "ann")]


def test_stages_come_after_what_they_read(version: Version) -> None:
    stages = folder_lineage(version.folder).stages
    assert not any(name.endswith(BUDGETS[1]) for name in stages)
    made: set[str] = set()
    everything = {path for stage in stages.values() for path in stage["makes"]}
    for stage in stages.values():
        assert stage["reads"].keys() & everything <= made
        made |= stage["makes"].keys()


def test_tree_and_json_hold_the_same(version: Version) -> None:
    told = version_lineage(version.client, version.registered, version.folder)
    output = io.StringIO()
    Console(width=200, file=output).print(lineage_tree(told))
    text = output.getvalue()
    for expected in ("tiny version 1", told.source["fingerprint"], "evaluate@tiny-0.3", "prefect_flow_run: 1f0c"):
        assert expected in text
    assert json.dumps(told.results)


@pytest.mark.parametrize(("name", "start"), [("lineage.svg", b"<?xml"), ("lineage.png", b"\x89PNG")])
def test_picture(version: Version, tmp_path: Path, name: str, start: bytes) -> None:
    draw_lineage(version_lineage(version.client, version.registered, version.folder), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_picture_of_another_kind_is_refused(version: Version, tmp_path: Path) -> None:
    with pytest.raises(NumpruneError, match=r"must end in \.svg or \.png"):
        draw_lineage(folder_lineage(version.folder), tmp_path / "lineage.bmp")


def test_folder_without_statement(tmp_path: Path) -> None:
    with pytest.raises(NumpruneError, match="no version folder"):
        folder_lineage(tmp_path)
