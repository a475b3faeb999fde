from pathlib import Path
from typing import Any

import pytest
import yaml

from numprune.allocation import Shapes
from numprune.errors import NumpruneError
from numprune.recipe import RECIPES
from tasks.parameters import RecipeChoice, load_parameters

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


@pytest.mark.parametrize("preset", RECIPES)
def test_presets_are_those_of_the_library(preset: str) -> None:
    assert RecipeChoice.model_validate({"preset": preset}).resolve() == RECIPES[preset]


def test_everything_in_a_recipe_can_be_chosen() -> None:
    chosen = {"selection": "flap", "allocation": "uniform", "recovery": "bias", "steps": 2, "planning_tokens": 64}
    chosen |= {"penalty": 3.0, "damping": "auto", "seed": 5}
    shapes = {"heads": 2, "channels": 64, "uniform": True, "depth": True}
    recipe = RecipeChoice.model_validate({"preset": "paper", "shapes": shapes, **chosen}).resolve()
    assert recipe.shapes == Shapes(**shapes)
    assert {name: getattr(recipe, name) for name in chosen} == chosen
    # Nothing was left out above.
    assert {*chosen, "preset", "shapes"} == set(RecipeChoice.model_fields)


def test_all_mistakes_are_reported_together(content: dict[str, Any], tmp_path: Path) -> None:
    content["calibration"]["sampels"] = 128
    content["budgets"] = [0.2, 1.0]
    content["benchmark"]["repeats"] = 0
    content["recipe"]["allocation"] = "median"
    with pytest.raises(NumpruneError, match=r"4 mistake\(s\)") as caught:
        load(content, tmp_path)
    for place in ("calibration.sampels", "budgets.1", "benchmark.repeats", "recipe.allocation"):
        assert place in str(caught.value)


@pytest.mark.parametrize("budget", ["0.2", "parameters-4M", "size-8MB", "memory-2GB", "flops-6G", "latency-5ms"])
def test_budgets_are_ratios_or_limits(content: dict[str, Any], tmp_path: Path, budget: str) -> None:
    content["budgets"] = [budget, 0.5]
    assert load(content, tmp_path).budgets == [budget, "0.5"]


@pytest.mark.parametrize("budget", [0, 1, -0.1, 1.5, float("nan"), "half", "size-8", "weight-8kg"])
def test_budget_that_is_none(content: dict[str, Any], tmp_path: Path, budget: Any) -> None:
    content["budgets"] = [budget]
    with pytest.raises(NumpruneError, match=r"budgets\.0"):
        load(content, tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", ".hidden", "a b"])
def test_model_that_is_no_folder_name(content: dict[str, Any], tmp_path: Path, name: str) -> None:
    content["models"] = [name]
    with pytest.raises(NumpruneError, match=r"models\.0"):
        load(content, tmp_path)


@pytest.mark.parametrize("key", ["models", "budgets"])
def test_what_is_named_twice_is_refused(content: dict[str, Any], tmp_path: Path, key: str) -> None:
    content[key] = content[key][:1] * 2
    with pytest.raises(NumpruneError, match="twice"):
        load(content, tmp_path)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "registry",
            {"tracking_uri": "postgresql://team:secret@db/mlflow"},
            "registry.tracking_uri: .*postgresql://db/mlflow stands with a password in it",
        ),
        ("watch", {"git_remote": "https://robot:secret@git.example/models"}, "watch.git_remote: .*with a password"),
        (
            "watch",
            {"sources": [{"kind": "feed", "url": "https://robot:secret@feed.example/list"}]},
            r"watch\.sources\.0\.feed\.url: .*with a password",
        ),
        (
            "watch",
            {"git_remote": "https://secret@git.example/models"},
            "watch.git_remote: .*https://git.example/models",
        ),
        ("watch", {"ledger": "postgresql://db/ledger?password=secret"}, "watch.ledger: .*with a password"),
        ("registry", {"tracking_uri": "sqlite:///./mlflow.db"}, "must lie in a folder of its own"),
        ("registry", {"tracking_uri": "sqlite:///mlflow.db"}, "must lie in a folder of its own"),
        ("signing", {"key": "keys/private.pem"}, "signing.key: .*must be an absolute path"),
    ],
)
def test_what_must_not_stand_in_the_file(
    content: dict[str, Any], tmp_path: Path, section: str, values: dict[str, Any], message: str
) -> None:
    content[section] |= values
    with pytest.raises(NumpruneError, match=message) as caught:
        load(content, tmp_path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("remote", ["origin", "git@git.example:models.git", "ssh://git@git.example/models"])
def test_remotes_without_a_secret(content: dict[str, Any], tmp_path: Path, remote: str) -> None:
    content["watch"]["git_remote"] = remote
    assert load(content, tmp_path).watch.git_remote == remote


def test_address_of_a_dask_cluster_needs_the_runner(content: dict[str, Any], tmp_path: Path) -> None:
    content["orchestration"]["address"] = "tcp://node-1:8786"
    with pytest.raises(NumpruneError, match=r"orchestration: .*set runner to dask"):
        load(content, tmp_path)
    content["orchestration"]["runner"] = "dask"
    assert load(content, tmp_path).orchestration.address == "tcp://node-1:8786"


def test_held_out_text_is_never_trained_on(content: dict[str, Any], tmp_path: Path) -> None:
    content["corpus"]["evaluation"].append(content["reference"]["training"]["packages"][0])
    with pytest.raises(NumpruneError, match="held-out"):
        load(content, tmp_path)


def test_download_needs_a_full_commit(content: dict[str, Any], tmp_path: Path) -> None:
    content["downloads"] = {"model": {"repository": "owner/model", "revision": "main"}}
    with pytest.raises(NumpruneError, match=r"downloads\.model\.revision"):
        load(content, tmp_path)


def test_dvc_cannot_read_a_download_whose_name_has_a_dot(content: dict[str, Any], tmp_path: Path) -> None:
    content["downloads"] = {"llama-3.1": {"repository": "owner/model", "revision": "0" * 40}}
    with pytest.raises(NumpruneError, match=r"'llama-3\.1' must have no dot"):
        load(content, tmp_path)


@pytest.mark.parametrize(
    "download",
    [
        {"revision": "0" * 40},
        {"repository": "owner/model", "folder": "/model", "revision": "0" * 40},
        {"folder": "/model", "revision": "0" * 40},
        {"repository": "owner/model", "revision": "0" * 64},
    ],
)
def test_download_has_one_origin_and_its_kind_of_revision(
    content: dict[str, Any], tmp_path: Path, download: dict[str, str]
) -> None:
    content["downloads"] = {"model": download}
    with pytest.raises(NumpruneError, match=r"downloads\.model: Value error, (give either|the revision must)"):
        load(content, tmp_path)


@pytest.mark.parametrize(("text", "message"), [("a: [", "no valid YAML"), ("", "the file"), ("- 1", "the file")])
def test_file_that_is_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(NumpruneError, match=message):
        load(text, tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NumpruneError, match="not found"):
        load_parameters(tmp_path / "params.yaml")
