import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from numprune.errors import NumpruneError
from tasks.parameters import Signing
from tasks.provenance.dvc_lock import read_lock
from tasks.provenance.evidence import write_evidence
from tasks.provenance.reproduce import Verdict, reproduce
from tasks.provenance.verify import verify_folder
from tasks.provenance.version_files import LOCK, STATEMENT
from tests.flows.conftest import MODEL, Checkout, copy_repository
from tests.tasks.provenance.conftest import make_build, make_folder


def change_code(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    statement = json.loads((folder / STATEMENT).read_text(encoding="utf-8"))
    code = statement["predicate"]["buildDefinition"]["resolvedDependencies"][-1]
    assert code["name"] == "code"
    change(code)
    (folder / STATEMENT).write_text(json.dumps(statement), encoding="utf-8")


def test_code_that_is_not_recorded_cannot_be_reproduced(unsigned: Path) -> None:
    change_code(unsigned, lambda code: code["annotations"].update(changed_since_commit="true"))
    with pytest.raises(NumpruneError, match="had been changed since commit"):
        reproduce(unsigned)
    change_code(unsigned, lambda code: code.pop("digest"))
    with pytest.raises(NumpruneError, match="names no commit"):
        reproduce(unsigned)


def test_commit_that_is_not_here(unsigned: Path) -> None:
    change_code(unsigned, lambda code: code["digest"].update(gitCommit="0" * 40))
    with pytest.raises(NumpruneError, match="is not in the repository of"):
        reproduce(unsigned)


def test_path_outside_of_the_repository_is_refused(unsigned: Path) -> None:
    text = (unsigned / LOCK).read_text(encoding="utf-8").replace("data/calibration.txt", "../calibration.txt")
    (unsigned / LOCK).write_text(text, encoding="utf-8")
    with pytest.raises(NumpruneError, match="outside of the repository"):
        reproduce(unsigned)
    worktrees = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert len(worktrees.splitlines()) == 1


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A copy of the repository in which DVC made everything for one budget."""
    checkout = copy_repository(tmp_path_factory.mktemp("compressed"))
    done = checkout.run("dvc", "repro", f"benchmark@{MODEL}-0.2", f"evaluate@{MODEL}-0.2", f"evaluate_dense@{MODEL}")
    assert done.returncode == 0, done.stdout
    return checkout


@pytest.mark.pipeline
def test_version_is_reproduced_bit_by_bit(
    compressed: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(compressed.root)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "version"
    make_folder(folder, "0.2")
    write_evidence(folder, make_build("0.2", "run"), Signing())
    assert list(map(str, verify_folder(folder, Signing()))) == []

    # The second time, other weights are in the record: one tensor differs a little.
    comparisons = reproduce(folder)
    assert {comparison.verdict for comparison in comparisons} == {Verdict.IDENTICAL}, comparisons
    made = read_lock((folder / LOCK).read_text(encoding="utf-8"))
    timed = f"artifacts/{MODEL}/0.2/benchmark.json"
    assert {c.path for c in comparisons} == {path for stage in made.values() for path in stage.outputs} - {timed}
    assert not list(Path(".numprune").iterdir())
    shutil.rmtree(folder)
