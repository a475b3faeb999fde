"""Real DVC in a small repository and in a workspace of links beside it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks.parameters import Parameters, load_parameters
from tasks.workspace import open_workspace

ROOT = Path(__file__).parents[2]
PIPELINE = """
stages:
  count:
    matrix:
      budget: ${budgets}
    cmd: mkdir -p artifacts && cat tasks/step.py models/mine/config.json data/mine.txt > artifacts/${item.budget}
    deps: [tasks/step.py, models/mine, "${calibration.data}"]
    outs: ["artifacts/${item.budget}"]
"""
CHANGES = {"budgets": ["0.2", "0.3"]}


def repro(folder: Path) -> str:
    command = [sys.executable, "-m", "dvc", "repro"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (".dvc/config", ".dvcignore", ".gitignore", "params.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("tasks/step.py", "models/mine/config.json", "models/fetched/config.json", "data/mine.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    content = yaml.safe_load((tmp_path / "params.yaml").read_text(encoding="utf-8"))
    content |= {"models": ["mine", "fetched"], "budgets": [0.2]}
    content["downloads"] = {"fetched": {"repository": "a/b", "revision": "0" * 40}}
    content["calibration"]["data"] = "data/mine.txt"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def parameters(root: Path) -> Parameters:
    return load_parameters(root / "params.yaml", changes=CHANGES)


def test_what_either_has_computed_the_other_restores(root: Path, parameters: Parameters) -> None:
    assert "Running stage 'count@0.2'" in repro(root)
    lock = (root / "dvc.lock").read_bytes()
    folder = root / ".numprune/sweep"
    open_workspace(folder, root, parameters, CHANGES)
    said = repro(folder)
    assert "Stage 'count@0.2' is cached" in said
    assert "Running stage 'count@0.3'" in said
    assert (root / "dvc.lock").read_bytes() == lock
    assert [path.name for path in (root / "artifacts").iterdir()] == ["0.2"]
    # A model that a stage fetches is one result of each; the registry is one.
    assert not (folder / "models/fetched").exists()
    assert (folder / "mlflow").resolve() == root / "mlflow"
    assert load_parameters(folder / "params.yaml") == parameters


def test_it_is_mended_and_follows_the_checkout(root: Path, parameters: Parameters) -> None:
    folder = root / ".numprune/sweep"
    open_workspace(folder, root, parameters, CHANGES)
    repro(folder)
    (folder / "dvc.lock").write_text("stages: {", encoding="utf-8")
    (folder / ".dvc/tmp/rwlock").write_text("{", encoding="utf-8")
    (root / "tasks/step.py").write_text("changed", encoding="utf-8")
    (root / "new.py").touch()
    shutil.move(root / "models/mine", root.parent / "mine")
    open_workspace(folder, root, parameters, CHANGES)
    assert not (folder / "models/mine").is_dir()
    shutil.move(root.parent / "mine", root / "models/mine")
    open_workspace(folder, root, parameters, CHANGES)
    assert (folder / "new.py").exists()
    assert repro(folder).count("Running stage") == 2
    assert (folder / "artifacts/0.3").read_text(encoding="utf-8").startswith("changed")
