from pathlib import Path
from typing import Any

import pytest
import yaml

from numprune.errors import NumpruneError
from numprune.recovery import Recovery
from tasks.parameters import Recipe, load_parameters

ROOT = Path(__file__).parents[2]


@pytest.fixture
def content() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def load(content: Any, folder: Path) -> Any:
    path = folder / "params.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return load_parameters(path)


def test_shipped_parameters_are_valid() -> None:
    assert load_parameters(ROOT / "params.yaml").models == ["reference-llama"]


def test_every_recovery_can_be_set() -> None:
    assert Recipe.model_fields["recovery"].annotation == Recovery


def test_all_mistakes_are_reported_together(content: dict[str, Any], tmp_path: Path) -> None:
    content["calibration"]["sampels"] = 128
    content["ratios"] = [0.2, 1.0]
    content["benchmark"]["repeats"] = 0
    content["recipe"]["threshold"] = "median"
    with pytest.raises(NumpruneError, match=r"4 mistake\(s\)") as caught:
        load(content, tmp_path)
    for place in ("calibration.sampels", "ratios.1", "benchmark.repeats", "recipe.threshold"):
        assert place in str(caught.value)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan"), "half"])
def test_ratio_outside_its_range(content: dict[str, Any], tmp_path: Path, ratio: Any) -> None:
    content["ratios"] = [ratio]
    with pytest.raises(NumpruneError, match=r"ratios\.0"):
        load(content, tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", ".hidden", "a b"])
def test_model_that_is_no_folder_name(content: dict[str, Any], tmp_path: Path, name: str) -> None:
    content["models"] = [name]
    with pytest.raises(NumpruneError, match=r"models\.0"):
        load(content, tmp_path)


@pytest.mark.parametrize("key", ["models", "ratios"])
def test_what_is_named_twice_is_refused(content: dict[str, Any], tmp_path: Path, key: str) -> None:
    content[key] = content[key][:1] * 2
    with pytest.raises(NumpruneError, match="twice"):
        load(content, tmp_path)


def test_held_out_text_is_never_trained_on(content: dict[str, Any], tmp_path: Path) -> None:
    content["corpus"]["evaluation"].append(content["reference"]["training"]["packages"][0])
    with pytest.raises(NumpruneError, match="held-out"):
        load(content, tmp_path)


def test_download_needs_a_full_commit(content: dict[str, Any], tmp_path: Path) -> None:
    content["downloads"] = {"model": {"repository": "owner/model", "revision": "main"}}
    with pytest.raises(NumpruneError, match=r"downloads\.model\.revision"):
        load(content, tmp_path)


@pytest.mark.parametrize(("text", "message"), [("a: [", "no valid YAML"), ("", "the file"), ("- 1", "the file")])
def test_file_that_is_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(NumpruneError, match=message):
        load(text, tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NumpruneError, match="not found"):
        load_parameters(tmp_path / "params.yaml")
