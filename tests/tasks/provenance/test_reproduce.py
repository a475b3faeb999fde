import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from numprune.errors import NumpruneError
from tasks.dvc_lock import read_lock
from tasks.parameters import Signing
from tasks.provenance.evidence import write_evidence
from tasks.provenance.reproduce import Verdict, compare, reproduce
from tasks.provenance.verify import verify_folder
from tasks.provenance.version_files import EVALUATION, LOCK, STATEMENT
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


@pytest.mark.parametrize(
    ("change", "tolerance", "verdict"),
    [
        (0.0, 0.0, Verdict.IDENTICAL),
        (1e-5, 0.0, Verdict.DIFFERENT),
        (1e-5, 1e-4, Verdict.WITHIN),
        (1e-2, 1e-4, Verdict.DIFFERENT),
    ],
)
def test_weights_are_compared_by_value_within_a_tolerance(
    unsigned: Path, tmp_path: Path, change: float, tolerance: float, verdict: Verdict
) -> None:
    path = f"artifacts/{MODEL}/0.3/checkpoint"
    stage = read_lock((unsigned / LOCK).read_text(encoding="utf-8"))[f"compensate@{MODEL}-0.3"]
    again = tmp_path / "checkpoint"
    shutil.copytree(path, again)
    if change:
        weights = load_file(again / "model.safetensors")
        weights["model.norm.weight"] *= 1 + change
        save_file(weights, again / "model.safetensors", {"format": "pt"})
    comparison = compare(again, stage, path, carried=unsigned, tolerance=tolerance)
    assert comparison.verdict is verdict
    assert comparison.deviation is None if not change else comparison.deviation == pytest.approx(change, rel=0.1)


def test_other_text_in_a_measurement_is_no_matter_of_tolerance(unsigned: Path, tmp_path: Path) -> None:
    path = f"artifacts/{MODEL}/0.3/evaluation.json"
    stage = read_lock((unsigned / LOCK).read_text(encoding="utf-8"))[f"evaluate@{MODEL}-0.3"]
    measured = json.loads((unsigned / EVALUATION).read_text(encoding="utf-8"))

    def verdict(**changes: Any) -> Verdict:
        (tmp_path / "evaluation.json").write_text(json.dumps(measured | changes), encoding="utf-8")
        return compare(tmp_path / "evaluation.json", stage, path, carried=unsigned / EVALUATION, tolerance=1e-3).verdict

    assert verdict() is Verdict.IDENTICAL
    assert verdict(perplexity=measured["perplexity"] * 1.0005) is Verdict.WITHIN
    assert verdict(protocol={"torch": "3.0"}) is Verdict.WITHIN
    assert verdict(perplexity=measured["perplexity"] * 1.005) is Verdict.DIFFERENT
    assert verdict(parameters=1) is Verdict.DIFFERENT
    (tmp_path / "evaluation.json").unlink()
    missing = compare(tmp_path / "evaluation.json", stage, path, carried=None, tolerance=1e-3)
    assert (missing.verdict, missing.reproduced) == (Verdict.DIFFERENT, None)


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

    comparisons = reproduce(folder)
    assert {comparison.verdict for comparison in comparisons} == {Verdict.IDENTICAL}, comparisons
    made = read_lock((folder / LOCK).read_text(encoding="utf-8"))
    timed = {f"artifacts/{MODEL}/{name}" for name in ("0.2/benchmark.json", "0.2/timing.json", "dense/timing.json")}
    assert {c.path for c in comparisons} == {path for stage in made.values() for path in stage.outputs} - timed
    assert not list(Path(".numprune").iterdir())
