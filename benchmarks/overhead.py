"""What orchestration adds: the same stages as plain function calls, under `dvc repro`, and under Prefect.

python -m benchmarks.overhead --help
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from flows.stages import stage_graph

# Runs every stage's step in one process, one after the other; commands come on standard input.
_PLAIN = """
import json, runpy, sys
for command in json.load(sys.stdin):
    _, _, module, *sys.argv[1:] = command.split()
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
# An unchanged run as a process that is already there sees it.
_UNCHANGED = """
import time
from pathlib import Path
from flows.stages import is_unchanged, stage_graph
stage_graph(Path())
start = time.perf_counter()
assert all(is_unchanged(Path(), stage) for stage in stage_graph(Path()))
print(time.perf_counter() - start)
"""


def overhead(
    *,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("report/overhead"),
) -> None:
    """Runs the pipeline of the last commit in clones of this repository and prints how long each way takes."""
    rows: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain, dvc, prefect = (_clone(Path(folder) / name) for name in ("plain", "dvc", "prefect"))
        commands = json.dumps(_commands(plain))
        rows["plain function calls"] = _seconds(plain, [sys.executable, "-c", _PLAIN], commands)
        rows["dvc repro"] = _seconds(dvc, [sys.executable, "-m", "dvc", "repro"])
        rows["flow under Prefect, with MLflow"] = _seconds(prefect, [sys.executable, "-m", "flows.compress"])
        rows["dvc repro, unchanged"] = _seconds(dvc, [sys.executable, "-m", "dvc", "repro"])
        rows["flow, unchanged"] = _seconds(prefect, [sys.executable, "-m", "flows.compress"])
        rows["all stages found unchanged, in process"] = float(_run(dvc, [sys.executable, "-c", _UNCHANGED]))
    first = rows["plain function calls"]
    table = ["| | seconds | added |", "|---|---:|---:|"]
    for name, seconds in rows.items():
        added = f"{seconds - first:+.1f} s" if "unchanged" not in name and seconds != first else ""
        table.append(f"| {name} | {seconds:.2f} | {added} |")
    output.mkdir(parents=True, exist_ok=True)
    (output / "overhead.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (output / "overhead.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))


def _clone(folder: Path) -> Path:
    subprocess.run(["git", "clone", "--quiet", str(Path.cwd()), str(folder)], check=True)
    return folder


def _commands(root: Path) -> list[str]:
    """The command of every stage, in an order in which they can run."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        commands = {stage.addressing: stage.cmd for stage in repo.index.stages}
    return [commands[name] for name in stage_graph(root)]


def _seconds(root: Path, command: list[str], text: str = "") -> float:
    start = time.perf_counter()
    _run(root, command, text)
    return time.perf_counter() - start


def _run(root: Path, command: list[str], text: str = "") -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        raise SystemExit(f"{' '.join(command[:3])} failed in {root}")
    return done.stdout.strip()


if __name__ == "__main__":
    typer.run(overhead)
