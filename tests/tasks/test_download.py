from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from numprune.errors import NumpruneError
from tasks.download import download, folder_revision

ROOT = Path(__file__).parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["downloads"] = {"fetched": {"repository": "owner/name", "revision": REVISION}}
    Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def serve(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[Any]:
    """Stands in for the Hub; returns what it was asked for."""
    asked: list[Any] = []

    def snapshot_download(
        repository: str, *, revision: str, local_dir: Path, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> None:
        asked.extend([repository, revision])
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / name).touch()
        (local_dir / ".cache").mkdir()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_exact_commit_without_pickles_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(
        monkeypatch, "config.json", "model.safetensors", "pytorch_model.bin", "modeling_custom.py", "onnx/config.json"
    )
    download("fetched")
    assert asked == ["owner/name", REVISION]
    # What the client notes down for itself holds times, and would make the same model another one.
    assert sorted(path.name for path in Path("models/fetched").iterdir()) == ["config.json", "model.safetensors"]


def test_only_pickled_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "config.json", "pytorch_model.bin")
    with pytest.raises(NumpruneError, match=r"no \.safetensors weights"):
        download("fetched")
    assert list(Path("models").iterdir()) == []


def test_unknown_name() -> None:
    with pytest.raises(NumpruneError, match=r"has no downloads\.other; it has: fetched"):
        download("other")


def announce(folder: Path) -> None:
    content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    content["downloads"] = {"fetched": {"folder": str(folder), "revision": folder_revision(folder)}}
    Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "releases/model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "modeling_custom.py").touch()
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    return folder


def test_folder_is_copied_without_code(folder: Path) -> None:
    announce(folder)
    download("fetched")
    assert sorted(path.name for path in Path("models/fetched").iterdir()) == ["config.json", "model.safetensors"]


def test_folder_that_changed_since_it_was_announced(folder: Path) -> None:
    announce(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(NumpruneError, match="is not what was announced"):
        download("fetched")
    assert list(Path("models").iterdir()) == []


def test_truncated_folder_has_no_revision(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(NumpruneError, match="truncated or damaged"):
        folder_revision(folder)
