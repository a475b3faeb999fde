"""Stages as DVC prints and declares them."""

import ast
import shutil
from pathlib import Path

import pytest
import yaml

from flows import stages, subprocess_group
from flows.progress import artifact_key
from flows.stages import Ending, Progress, is_unchanged, run_stage, side_by_side, stage_graph
from tests.flows.conftest import ROOT

# They change no result: messages, refusals, progress lines, renaming of finished files, where states and tensors lie.
PLUMBING = {
    *(
        f"numprune/{name}.py"
        for name in ("errors", "files", "memory", "overlap", "pickled", "progress", "resume", "shards")
    ),
    *(f"tasks/{name}.py" for name in ("layout", "parameters", "step")),
}
_CHOOSING = {"allocation", "baselines", "box", "newton", "obs", "ranking", "recipe"}
_CUTTING = {"cholesky", "compensation", "cutting", "plan", "recovery", "slicing"}
# What a step imports by way of others and does not come to. `pruning`, which captures, also applies plans; the step
# that evaluates pruned models cuts without recovery, and leaves all of that where it evaluates a dense one; the report
# reads what plans and rankings say.
UNUSED = {
    "calibrate": {"ragged_multimodal"},
    "capture": {*_CHOOSING, *_CUTTING, "ragged_multimodal"},
    "score": {"budget", "plan", "pruning", "ragged_multimodal", "recovery", "stock"},
    "prune": {"ragged_multimodal"},
    "compensate": _CHOOSING - {"recipe"},
    "evaluate_dense": {
        *(*_CHOOSING, *_CUTTING, "budget", "generation_benchmark", "pruning"),
        *("ragged_multimodal", "reconstruction", "second_moments"),
    },
    "evaluate": {*_CHOOSING, "budget", "cholesky", "compensation", "second_moments"},
    "summary": {
        *("baselines", "batches", "box", "capture", "cholesky", "newton", "obs", "ragged_multimodal", "ranks"),
        *("recovery", "samples", "second_moments", "statistics", "streaming"),
    },
}

RUNNING = """Running stage 'score@small':
> python -m tasks score small
"""
FAILED = "ERROR: failed to reproduce 'score@small': failed to run: python -m tasks score small, exited with {}\n"


def run_shown(stage: str, shown: list[str], root: Path = ROOT) -> stages.Outcome:
    return run_stage(root, stage, environment={}, owner="test", timeout_hours=1, on_line=shown.append)


def run_printed(monkeypatch: pytest.MonkeyPatch, text: str, code: int) -> tuple[stages.Outcome, list[str]]:
    """Runs a stage whose DVC prints `text`."""

    def run(command: list[str], *, folder: Path, environment, owner: str, timeout: float, on_line) -> int:
        assert command[-1] == "score@small"
        assert (folder, environment, owner) == (ROOT, {}, "test")
        assert timeout == 3600
        for line in text.splitlines():
            on_line(line)
        return code

    monkeypatch.setattr(subprocess_group, "run", run)
    shown: list[str] = []
    return run_shown("score@small", shown), shown


def test_only_the_lines_of_the_stage_itself_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    text = RUNNING + "score 1/2, 3 s left\nscore 2/2, 0 s left\nUpdating lock file 'dvc.lock'\nUse `dvc push`.\n"
    outcome, shown = run_printed(monkeypatch, text, 0)
    assert outcome.ending is Ending.COMPLETED
    assert shown == ["score 1/2, 3 s left", "score 2/2, 0 s left"]


def test_cached_results_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Stage 'score@small' is cached - skipping run, checking out outputs\nUpdating lock file 'dvc.lock'\n"
    outcome, shown = run_printed(monkeypatch, text, 0)
    assert outcome.ending is Ending.RESTORED
    assert shown == []


def test_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    text = RUNNING + "score 1/2, 3 s left\nerror: weights hold NaN:\n  block 3\n" + FAILED.format(2)
    outcome, shown = run_printed(monkeypatch, text, 255)
    assert outcome == stages.Outcome(Ending.REJECTED, "weights hold NaN:\n  block 3")
    assert shown == ["score 1/2, 3 s left"]


def test_crash_is_shown_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    text = RUNNING + "Traceback (most recent call last):\n  somewhere\nKeyError: 'x'\n" + FAILED.format(1)
    outcome, shown = run_printed(monkeypatch, text, 255)
    assert outcome == stages.Outcome(Ending.FAILED, "KeyError: 'x'")
    assert shown[0].startswith("Traceback")


def test_error_of_dvc_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, _ = run_printed(monkeypatch, "ERROR: failed to reproduce 'score@small': missing data 'source': x\n", 255)
    assert outcome == stages.Outcome(Ending.FAILED, "failed to reproduce 'score@small': missing data 'source': x")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("capture 3/6, 12 s left", Progress("capture", 3, 6)),
        ("evaluate without compensation 1/32, 4 s left", Progress("evaluate without compensation", 1, 32)),
        ("step 2 of 3 rank 1/12, 3 s left", Progress("step 2 of 3 rank", 1, 12)),
        ("capture 0/0", None),
        ("loaded 3 of 6", None),
        ("/tmp/1/2", None),
    ],
)
def test_progress_lines(line: str, expected: Progress | None) -> None:
    assert Progress.read(line) == expected


def test_artifact_key() -> None:
    assert artifact_key("evaluate@Llama_3-0.2") == "evaluate-llama-3-0-2"


def test_stages_come_after_what_they_need() -> None:
    graph = stage_graph(ROOT)
    order = list(graph)
    assert all(order.index(needed) < order.index(name) for name, needs in graph.items() for needed in needs)
    # The summary reads every metric file.
    assert {name.partition("@")[0] for name in graph["summary"]} >= {"prune", "evaluate_dense", "evaluate", "benchmark"}


def test_stages_are_asked_for_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker of Dask does."""
    shutil.copytree(ROOT / ".dvc", tmp_path / "checkout/.dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    shutil.copytree(ROOT / "tasks", tmp_path / "checkout/tasks")
    (tmp_path / "checkout/dvc.yaml").write_text("stages: {own: {cmd: echo > made, deps: [read], outs: [made]}}\n")
    (tmp_path / "checkout/read").touch()
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "checkout"
    (root / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    assert not is_unchanged(root, "own")
    assert run_shown("own", [], root) == stages.Outcome(Ending.COMPLETED)
    assert is_unchanged(root, "own")


def declared_stages() -> dict[str, dict]:
    declared = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name: stage.get("do", stage) for name, stage in declared.items()}


def imported_files(path: Path) -> set[Path]:
    """Modules of the library and of the steps that a file imports, but for plumbing."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    names = {node.module or "" for node in nodes}
    names |= {f"numprune.{name.name}" for node in nodes if node.module == "numprune" for name in node.names}
    files = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith(("numprune.", "tasks."))}
    return {file for file in files if file.is_file() and file.relative_to(ROOT).as_posix() not in PLUMBING}


def reached_modules(path: Path) -> set[str]:
    """Modules of the library that a file imports, and those that what it imports does."""
    reached: set[Path] = set()
    left = {path}
    while left := set().union(*map(imported_files, left)) - reached:
        reached |= left
    return {file.stem for file in reached if file.parent.name == "numprune"}


@pytest.mark.parametrize("name", [name for name, stage in declared_stages().items() if "numprune/" in str(stage)])
def test_stages_depend_on_the_code_they_import(name: str) -> None:
    """A change of a step or of a library module it uses, by whatever way, must not go unnoticed."""
    stage = declared_stages()[name]
    step = Path("tasks", stage["cmd"].split()[3] + ".py")
    reached = reached_modules(ROOT / step) - UNUSED.get(name, set())
    assert {f"numprune/{module}.py" for module in reached} | {step.as_posix()} <= set(stage["deps"])


def test_declared_files_exist() -> None:
    code = {dep for stage in declared_stages().values() for dep in stage.get("deps", []) if dep.endswith(".py")}
    assert [path for path in sorted(code) if not (ROOT / path).is_file()] == []


def test_nothing_runs_beside_the_search_for_a_latency() -> None:
    graph = {"score@m": set(), "evaluate_dense@m": set()}
    for budget in ("0.2", "latency-5ms"):
        graph |= {f"prune@m-{budget}": {"score@m"}, f"compensate@m-{budget}": {f"prune@m-{budget}"}}
        graph |= {f"benchmark@m-{budget}": {f"compensate@m-{budget}"}}
    assert list(side_by_side(graph)) == [
        ["score@m", "evaluate_dense@m", "prune@m-0.2", "compensate@m-0.2"],
        ["benchmark@m-0.2"],
        ["prune@m-latency-5ms"],
        ["compensate@m-latency-5ms"],
        ["benchmark@m-latency-5ms"],
    ]


def test_nothing_runs_beside_a_benchmark() -> None:
    graph = stage_graph(ROOT)
    first, *timed, last = side_by_side(graph)
    assert sorted([*first, *(stage for (stage,) in timed), *last]) == sorted(graph)
    assert {stage for (stage,) in timed} == {stage for stage in graph if stage.startswith("benchmark@")}
    assert last == ["summary"]
    # What a stage needs is in a group before its own, or before it in its own.
    order = [stage for group in side_by_side(graph) for stage in group]
    assert all(order.index(needed) < order.index(stage) for stage in graph for needed in graph[stage])
