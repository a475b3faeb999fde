"""Real git and real DVC in a small repository of its own."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from numprune.errors import NumpruneError
from tasks.parameters import Download, Parameters, load_parameters
from tasks.releases import checkout
from tasks.releases.ledger import Entry, Key, shaping_hash
from tasks.releases.sources import Release

ROOT = Path(__file__).parents[3]
REVISION = "0123456789abcdef" * 4
PIPELINE = """
stages:
  count:
    cmd: mkdir -p data && printf ran >> data/count
    params: [models]
    deps: [text]
    outs: [data/count]
"""


def run(root: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(root: Path, *arguments: str) -> str:
    return run(root, sys.executable, "-m", "dvc", *arguments)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # As on a server on which nobody has set git up.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("GIT_COMMITTER_EMAIL", raising=False)
    root = tmp_path / "repository"
    (root / ".dvc").mkdir(parents=True)
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "params.yaml"):
        shutil.copy(ROOT / name, root / name)
    (root / "text").write_text("text", encoding="utf-8")
    (root / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    (root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n", encoding="utf-8")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], [*identity, "commit", "-q", "-m", "All"]):
        run(root, "git", *command)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def parameters(root: Path) -> Parameters:
    return load_parameters(root / "params.yaml")


@pytest.fixture
def entry(parameters: Parameters) -> Entry:
    release = Release("model", Download(folder="/models/model", revision=REVISION))
    key = Key("model", REVISION, shaping_hash(parameters))
    return Entry(key, release, f"release/model/{REVISION[:12]}", "running", "run", 1, True, None)


def test_worktree_differs_in_the_model_alone(root: Path, entry: Entry, parameters: Parameters) -> None:
    folder = checkout.prepare(entry, parameters, root)
    assert folder == root / f".numprune/worktrees/model-{REVISION[:12]}"
    text = (root / "params.yaml").read_text(encoding="utf-8")
    changed = (folder / "params.yaml").read_text(encoding="utf-8")
    expected = yaml.safe_load(text) | {
        "models": ["model"],
        "downloads": {"model": {"folder": "/models/model", "revision": REVISION}},
    }
    assert yaml.safe_load(changed) == expected
    assert [line for line in text.splitlines() if "#" in line or "null" in line] == [
        line for line in changed.splitlines() if "#" in line or "null" in line
    ]
    # The record of this release does not name the results of others.
    assert not (folder / "dvc.lock").exists()
    assert run(root, "git", "status", "--porcelain") == ""
    assert (folder / "mlflow").resolve() == root / "mlflow"


def test_commit_without_an_identity_and_without_changes(root: Path, entry: Entry, parameters: Parameters) -> None:
    folder = checkout.prepare(entry, parameters, root)
    dvc(folder, "repro")
    first = checkout.commit(entry, folder)
    assert checkout.commit(entry, folder) == first
    message = run(root, "git", "log", "--format=%an <%ae>%n%B", f"main..{entry.branch}").strip().splitlines()
    assert message == [
        "numprune <numprune@localhost>",
        f"Compress model {REVISION[:12]} at 0.2, 0.5",
        "",
        "Source: /models/model",
        f"Revision: {REVISION}",
        "Budgets: 0.2, 0.5",
    ]
    assert run(folder, "git", "status", "--porcelain") == ""
    assert "up to date" in dvc(folder, "status")


def test_configured_identity_is_used(root: Path, entry: Entry, parameters: Parameters) -> None:
    run(root, "git", "config", "user.name", "Somebody")
    run(root, "git", "config", "user.email", "somebody@example.invalid")
    folder = checkout.prepare(entry, parameters, root)
    (folder / "dvc.lock").touch()
    checkout.commit(entry, folder)
    assert run(root, "git", "log", "-1", "--format=%an", entry.branch).strip() == "Somebody"


def test_inputs_that_git_ignores_are_there(root: Path, parameters: Parameters, entry: Entry) -> None:
    (root / "data").mkdir()
    (root / "data/mine.txt").write_text("text", encoding="utf-8")
    calibration = parameters.calibration.model_copy(update={"data": "data/mine.txt"})
    named = parameters.model_copy(update={"calibration": calibration})
    folder = checkout.prepare(replace(entry, key=replace(entry.key, parameters=shaping_hash(named))), named, root)
    assert (folder / "data/mine.txt").read_text(encoding="utf-8") == "text"
    assert "data" not in run(folder, "git", "status", "--porcelain")


def test_results_are_shared_through_the_cache(root: Path, entry: Entry, parameters: Parameters) -> None:
    folder = checkout.prepare(entry, parameters, root)
    dvc(folder, "repro")
    checkout.commit(entry, folder)
    checkout.remove(entry, parameters, root)
    assert not folder.exists()
    assert run(root, "git", "branch", "--list", entry.branch).strip() == entry.branch
    # Made again, the worktree has its record, and DVC restores what it names without running anything.
    assert checkout.prepare(entry, parameters, root) == folder
    assert "Running stage" not in dvc(folder, "repro")
    assert (folder / "data/count").read_text(encoding="utf-8") == "ran"
    assert run(folder, "git", "status", "--porcelain") == ""
    checkout.remove(entry, parameters, root)
    checkout.remove(entry, parameters, root)


def test_earlier_results_stay_in_a_worktree_that_is_used_again(
    root: Path, entry: Entry, parameters: Parameters
) -> None:
    folder = checkout.prepare(entry, parameters, root)
    dvc(folder, "repro")
    lock = (folder / "dvc.lock").read_bytes()
    assert checkout.prepare(entry, parameters, root) == folder
    assert (folder / "dvc.lock").read_bytes() == lock


def private(root: Path, folder: Path) -> Path:
    return root / ".git/worktrees" / folder.name


def test_what_a_killed_run_left_is_mended(root: Path, entry: Entry, parameters: Parameters) -> None:
    folder = checkout.prepare(entry, parameters, root)
    dvc(folder, "repro")
    whole = (folder / "dvc.lock").read_text(encoding="utf-8")
    (folder / "dvc.lock").write_text(whole[: whole.index("path:") + 5], encoding="utf-8")
    (folder / ".dvc/tmp/rwlock").write_text("{", encoding="utf-8")
    for lock in ("index.lock", "HEAD.lock"):
        (private(root, folder) / lock).touch()
    (root / ".git/refs/heads" / f"{entry.branch}.lock").touch()
    checkout.prepare(entry, parameters, root)
    assert "Running stage" not in dvc(folder, "repro")
    assert (folder / "dvc.lock").read_text(encoding="utf-8") == whole
    checkout.commit(entry, folder)
    assert run(folder, "git", "status", "--porcelain") == ""


@pytest.mark.parametrize("left", ["locked", "no folder", "no link", "empty"])
def test_worktree_that_was_killed_while_it_was_made(
    root: Path, entry: Entry, parameters: Parameters, left: str
) -> None:
    folder = checkout.prepare(entry, parameters, root)
    (private(root, folder) / "numprune-ready").unlink()
    match left:
        case "locked":
            (private(root, folder) / "locked").write_text("initializing", encoding="utf-8")
            (folder / "params.yaml").unlink()
        case "no folder":
            shutil.rmtree(folder)
        case "no link":
            (folder / ".git").unlink()
        case "empty":
            shutil.rmtree(private(root, folder))
    assert checkout.prepare(entry, parameters, root) == folder
    assert load_parameters(folder / "params.yaml").models == ["model"]
    assert run(root, "git", "worktree", "list").count("\n") == 2
    assert run(root, "git", "branch", "--list", "release/*").count("\n") == 1


def test_stage_that_outlived_its_run_is_ended(root: Path, entry: Entry, parameters: Parameters) -> None:
    folder = checkout.prepare(entry, parameters, root)
    (folder / "tasks").mkdir()
    (folder / "tasks/endless.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    stage = subprocess.Popen([sys.executable, "-m", "tasks.endless"], cwd=folder)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=folder)
    try:
        time.sleep(0.5)
        checkout.prepare(entry, parameters, root)
        assert not psutil.pid_exists(stage.pid)
        assert other.poll() is None
    finally:
        stage.kill()
        other.kill()
        other.wait()


def test_parameters_that_changed_since(root: Path, entry: Entry, parameters: Parameters) -> None:
    old = replace(entry, key=replace(entry.key, parameters="0" * 64))
    with pytest.raises(NumpruneError, match=r"params\.yaml changed since"):
        checkout.prepare(old, parameters, root)
    # A worktree that was prepared in time goes on with its own.
    checkout.prepare(entry, parameters, root)
    content = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    content["calibration"]["seed"] = 7
    (root / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    folder = checkout.prepare(entry, load_parameters(root / "params.yaml"), root)
    assert load_parameters(folder / "params.yaml").calibration.seed == 0


@pytest.mark.parametrize("level", ["--local", "--project"])
def test_push_to_the_remote_of_the_main_checkout(
    root: Path, entry: Entry, parameters: Parameters, level: str, tmp_path: Path
) -> None:
    # A relative path counts from the file it stands in, which the worktree has elsewhere.
    dvc(root, "remote", "add", level, "--default", "storage", "../remote")
    run(root, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qam", "Remote", "--allow-empty")
    folder = checkout.prepare(entry, parameters, root)
    dvc(folder, "repro")
    assert checkout.push(folder) == "storage"
    assert len([path for path in (tmp_path / "remote/files/md5").rglob("*") if path.is_file()]) == 1
    assert run(folder, "git", "status", "--porcelain", ".dvc") == ""


def test_push_without_a_remote_and_to_one_that_fails(root: Path, entry: Entry, parameters: Parameters) -> None:
    folder = checkout.prepare(entry, parameters, root)
    dvc(folder, "repro")
    assert checkout.push(folder) is None
    (root / "file").touch()
    dvc(root, "remote", "add", "--local", "--default", "storage", str(root / "file"))
    checkout.prepare(entry, parameters, root)
    with pytest.raises(ConnectionError, match="dvc push to storage failed"):
        checkout.push(folder)


def test_branch_is_pushed_to_a_git_remote(root: Path, entry: Entry, parameters: Parameters, tmp_path: Path) -> None:
    run(tmp_path, "git", "init", "--quiet", "--bare", "shared.git")
    run(root, "git", "remote", "add", "origin", str(tmp_path / "shared.git"))
    folder = checkout.prepare(entry, parameters, root)
    dvc(folder, "repro")
    made = checkout.commit(entry, folder)
    checkout.push_branch(entry, folder, "origin")
    assert run(tmp_path / "shared.git", "git", "rev-parse", entry.branch).strip() == made
    with pytest.raises(ConnectionError, match="git push"):
        checkout.push_branch(entry, folder, "elsewhere")
