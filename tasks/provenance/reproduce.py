"""Reproduce a version from its record: the code of its commit, its parameters, an empty cache; then compare."""

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from numprune.checkpoint import CALIBRATION_FILE, PLAN_FILE
from numprune.errors import NumpruneError
from tasks.dvc_lock import LockedStage, read_lock, stages_behind, version_outputs
from tasks.layout import (
    benchmark_file,
    calibration_file,
    checkpoint_folder,
    evaluation_file,
    plan_file,
    timing_file,
)
from tasks.parameters import load_parameters
from tasks.provenance.statement import CODE, dependencies, parse_statement
from tasks.provenance.version_files import (
    DENSE_EVALUATION,
    EVALUATION,
    LOCK,
    PARAMETERS,
    STATEMENT,
    digest_file,
    dvc_folder_hash,
    is_weights,
    model_digests,
    read_json,
)

# Says where and with what something was measured, which may differ.
_PROTOCOL = "protocol"
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class Verdict(Enum):
    """How an output came out the second time."""

    IDENTICAL = "bit-identical"
    WITHIN = "within the tolerance"
    INTERMEDIATE = "other bytes; its values are not recorded"
    DIFFERENT = "different"


@dataclass(frozen=True)
class Comparison:
    """One output of a stage, recorded and reproduced.

    Attributes:
        path: Of the output in the repository.
        stage: That makes it.
        recorded: DVC's hash in the record.
        reproduced: DVC's hash of the second time; None if it did not come out.
        verdict: Whether they are the same.
        deviation: The largest relative difference of its numbers, where they could be compared.
    """

    path: str
    stage: str
    recorded: str
    reproduced: str | None
    verdict: Verdict
    deviation: float | None


def reproduce(folder: Path, *, tolerance: float = 0.0) -> list[Comparison]:
    """Runs the stages of a version again from its record, in a temporary git worktree, and compares what comes out.

    What depends on the speed of the machine, the benchmark, is left out. The process must run in a clone of the
    repository that has the recorded commit.

    Args:
        folder: The version folder.
        tolerance: How far numbers may be from the recorded ones, relative to the largest of their tensor; 0 asks for
            the same bytes. It is meant for other hardware or other versions of libraries. Only what the version folder
            holds can be compared by value; an intermediate result with other bytes then says nothing by itself.

    Raises:
        NumpruneError: If the record names no commit or the code had been changed since, the commit is not there, an
            input cannot be had, or a stage fails.
    """
    try:
        statement = parse_statement((folder / STATEMENT).read_text(encoding="utf-8"))
        recorded = read_lock((folder / LOCK).read_text(encoding="utf-8"))
    except OSError as error:
        raise NumpruneError(f"{folder} is no version folder: {error}") from None
    commit = _recorded_commit(statement)
    external = statement["predicate"]["buildDefinition"]["externalParameters"]
    model, budget = external["model"], external["budget"]
    timed = benchmark_file(model, budget).as_posix()
    durations = {timing_file(model, of).as_posix() for of in (budget, None)}
    wanted = [path for path in version_outputs(model, budget) if path != timed]
    stages = stages_behind(recorded, wanted)
    _check_paths(stages)
    # DVC puts names of models and budgets into command lines; the schema lets them be names only.
    load_parameters(folder / PARAMETERS)
    targets = [stage.name for stage in stages.values() if stage.outputs.keys() & set(wanted)]
    with _worktree(commit) as root:
        (root / "dvc.lock").unlink(missing_ok=True)  # Without it, nothing counts as done.
        shutil.copyfile(folder / PARAMETERS, root / "params.yaml")
        _bring_inputs(root, stages)
        _run_stages(root, targets)
        carried = _carried_files(folder, model, budget)
        return [
            compare(root / path, stage, path, carried=carried.get(path), tolerance=tolerance)
            for stage in stages.values()
            for path in stage.outputs
            if path not in durations
        ]


def compare(again: Path, stage: LockedStage, path: str, *, carried: Path | None, tolerance: float) -> Comparison:
    """Compares what came out with the record.

    Args:
        again: Where it lies.
        stage: That makes it, as recorded.
        path: Its path in the repository.
        carried: The recorded file or folder, if the version carries it; otherwise only its hash is known.
        tolerance: As in `reproduce`.
    """
    recorded = stage.outputs[path]
    reproduced = _dvc_hash(again) if again.exists() else None
    deviation = None
    if reproduced == recorded:
        verdict = Verdict.IDENTICAL
    elif reproduced is None:
        verdict = Verdict.DIFFERENT
    elif carried is None:
        verdict = Verdict.INTERMEDIATE if tolerance else Verdict.DIFFERENT
    else:
        deviation = _deviation(carried, again)
        verdict = Verdict.WITHIN if deviation <= tolerance else Verdict.DIFFERENT
    return Comparison(path, stage.name, recorded, reproduced, verdict, deviation)


def _recorded_commit(statement: Mapping[str, Any]) -> str:
    code = dependencies(statement, CODE)[CODE]
    commit = code.get("digest", {}).get("gitCommit")
    if commit is None or not _COMMIT.fullmatch(commit):
        raise NumpruneError("The record names no commit: the version was made outside of git and cannot be reproduced.")
    if code["annotations"]["changed_since_commit"] != "false":
        raise NumpruneError(
            f"The version was made by code that had been changed since commit {commit} and was not committed: that "
            "code is not recorded, so it cannot be reproduced."
        )
    found = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True, check=False)
    if found.returncode:
        raise NumpruneError(
            f"Commit {commit} is not in the repository of {Path.cwd()}: run this in a clone of numprune's repository "
            "that has it (`git fetch`)."
        )
    return str(commit)


@contextmanager
def _worktree(commit: str) -> Iterator[Path]:
    """A checkout of a commit that is removed afterwards, with a DVC cache of its own inside."""
    # Beside the other files of the pipeline, because system folders for temporary files are often too small.
    base = Path(".numprune")
    base.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="reproduce-", dir=base) as temporary:
        root = Path(temporary).resolve() / "checkout"
        _run(["git", "worktree", "add", "--quiet", "--detach", str(root), commit], Path.cwd())
        try:
            cache = root.parent / "cache"
            _run([sys.executable, "-m", "dvc", "config", "--local", "cache.dir", str(cache)], root)
            yield root
        finally:
            _run(["git", "worktree", "remove", "--force", str(root)], Path.cwd())


def _check_paths(stages: Mapping[str, LockedStage]) -> None:
    for stage in stages.values():
        for path in (*stage.dependencies, *stage.outputs):
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise NumpruneError(f"The record names {path}, which is outside of the repository: it is refused.")


def _bring_inputs(root: Path, stages: Mapping[str, LockedStage]) -> None:
    """Copies inputs that git does not hold from this checkout, if they are those of the record."""
    made = {path for stage in stages.values() for path in stage.outputs}
    needed = {path: md5 for stage in stages.values() for path, md5 in stage.dependencies.items() if path not in made}
    for path, md5 in needed.items():
        if (root / path).exists():
            continue
        here = Path(path)
        if not here.exists() or _dvc_hash(here) != md5:
            raise NumpruneError(
                f"The input {path} ({md5}) is neither in the recorded commit nor in {Path.cwd()}: bring it there first."
            )
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if here.is_dir():
            shutil.copytree(here, root / path)
        else:
            shutil.copyfile(here, root / path)


def _run_stages(root: Path, targets: list[str]) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # PYTHONPATH could put this checkout's code before the recorded one.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    _run(
        [sys.executable, "-m", "dvc", "repro", "--", *targets],
        root,
        {**environment, "PATH": path, "DVC_NO_ANALYTICS": "1"},
    )


def _run(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise NumpruneError(f"`{' '.join(command[:4])} ...` failed with exit code {done.returncode}:\n{last}")


def _carried_files(folder: Path, model: str, budget: str) -> dict[str, Path]:
    """Which outputs the version folder holds with their values, by their path in the repository."""
    return {
        checkpoint_folder(model, budget).as_posix(): folder,
        calibration_file(model).as_posix(): folder / CALIBRATION_FILE,
        plan_file(model, budget).as_posix(): folder / PLAN_FILE,
        evaluation_file(model, budget).as_posix(): folder / EVALUATION,
        evaluation_file(model, None).as_posix(): folder / DENSE_EVALUATION,
    }


def _dvc_hash(path: Path) -> str:
    if path.is_file():
        return digest_file(path).md5
    return dvc_folder_hash({name: digests.md5 for name, digests in model_digests(path).items()})


def _deviation(recorded: Path, again: Path) -> float:
    """The largest relative difference of numbers; infinite if anything else differs."""
    if again.is_dir():
        weights = sorted(path.name for path in again.iterdir() if is_weights(path.name))
        settings = [_values(read_json(recorded / name), read_json(again / name)) for name in ("config.json", PLAN_FILE)]
        return max([*settings, *(_tensors(recorded / name, again / name) for name in weights)])
    if again.suffix == ".safetensors":
        return _tensors(recorded, again)
    return _values(read_json(recorded), read_json(again))


def _tensors(recorded: Path, again: Path) -> float:
    from safetensors import safe_open

    if not recorded.exists():
        return math.inf
    largest = 0.0
    with safe_open(recorded, "pt") as first, safe_open(again, "pt") as second:
        if set(first.keys()) != set(second.keys()):
            return math.inf
        for name in first.keys():  # noqa: SIM118  # No dictionary.
            one, two = first.get_tensor(name).double(), second.get_tensor(name).double()
            if one.shape != two.shape:
                return math.inf
            scale = one.abs().max().item() or 1.0
            largest = max(largest, (one - two).abs().max().item() / scale)
    return largest


def _values(recorded: Any, again: Any) -> float:
    if isinstance(recorded, Mapping) and isinstance(again, Mapping):
        if recorded.keys() != again.keys():
            return math.inf
        return max((_values(recorded[key], again[key]) for key in recorded if key != _PROTOCOL), default=0.0)
    if isinstance(recorded, float) and isinstance(again, float):
        return abs(recorded - again) / (abs(recorded) or 1.0)
    return 0.0 if recorded == again else math.inf
