"""What orchestration adds: the same work as plain function calls, by DVC, and by the flow with Prefect and MLflow.

python -m benchmarks.overhead --help
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from flows.stages import stage_graph
from infra.servers import servers
from numprune.errors import NumpruneError
from tasks.parameters import PARAMETERS_FILE, load_parameters
from tasks.step import run_step
from tasks.workspace import write_parameters

PLAIN, FLOW = "plain function calls", "python -m flows.compress"
# How each way is called, behind the interpreter.
WAYS: Mapping[str, Sequence[str]] = {
    "dvc repro": ["-m", "dvc", "repro"],
    "make repro": ["-m", "tasks.forkserver", "dvc", "repro"],
    FLOW: ["-m", "flows.compress"],
}
SERVED = f"{FLOW}, Prefect's server being there"

# Sections of params.yaml, and what is otherwise in them.
JOBS: Mapping[str, Mapping[str, Any]] = {
    "small": {
        "budgets": [0.2],
        "corpus": {"calibration": ["datasets"], "evaluation": ["huggingface_hub"], "questions": 20},
        "calibration": {"samples": 16, "length": 128},
        "recipe": {"planning_tokens": 512},
        "evaluation": {"length": 128, "max_tokens": 4096, "tasks": []},
        "benchmark": {"batches": [1], "new_tokens": 16, "repeats": 1},
    },
    "params": {},
    "long": {"budgets": [0.1, 0.2, 0.3, 0.4, 0.5]},
}

# One stage after the other then has all cores, as far as there is no flow that runs others beside it.
_IN_TURN: Mapping[str, Any] = {"orchestration": {"workers": 1}}

# Every stage's step in one process; modules and arguments come on standard input.
_PLAIN = """
import json, runpy, sys
for module, *arguments in json.load(sys.stdin):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
# A process that has imported the flow and is asked for an unchanged run; the last line says how long that took.
_IN_PROCESS = """
import time
from flows.compress import main
start = time.perf_counter()
assert main() == 0
print(time.perf_counter() - start)
"""


def overhead(
    *,
    job: Annotated[
        str, typer.Option(help="small, params for params.yaml as it is, or long for five budgets.")
    ] = "small",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of everything; medians are shown.")] = 3,
    flow_alone: Annotated[bool, typer.Option("--flow-alone", help="Leave the ways without Prefect out.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("report/overhead"),
) -> None:
    """Runs the last commit in fresh clones of this repository, every way in turn, and then again."""
    if job not in JOBS:
        raise NumpruneError(f"--job must be one of {', '.join(JOBS)}, got {job!r}.")
    ways = {name: command for name, command in WAYS.items() if name == FLOW or not flow_alone}
    runs: list[dict[str, float]] = []
    for number in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(_measure(Path(folder), JOBS[job], ways))
        print(f"run {number + 1}/{repeats}: {json.dumps(runs[-1])}", file=sys.stderr, flush=True)
    table = _table(runs)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{job}.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    (output / f"{job}.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def _measure(folder: Path, changes: Mapping[str, Any], ways: Mapping[str, Sequence[str]]) -> dict[str, float]:
    python = sys.executable
    plain = _clone(folder / "plain", {**changes, **_IN_TURN})
    seconds = {PLAIN: _seconds(plain, [python, "-c", _PLAIN], text=json.dumps(_commands(plain)))}
    clones: dict[str, Path] = {}
    for name, command in ways.items():
        clones[name] = _clone(folder / name.replace(" ", "-"), changes if name == FLOW else {**changes, **_IN_TURN})
        seconds[name] = _seconds(clones[name], [python, *command])
    with servers(folder / "servers", worker=False) as running:
        served = _clone(folder / "served", changes)
        seconds[SERVED] = _seconds(served, [python, *WAYS[FLOW]], PREFECT_API_URL=running.prefect)
    for name, command in ways.items():
        seconds[f"{name}, unchanged"] = _seconds(clones[name], [python, *command])
    last = _run(clones[FLOW], [python, "-c", _IN_PROCESS]).splitlines()[-1]
    return seconds | {"the same in a process that is there": float(last)}


def _table(runs: list[dict[str, float]]) -> str:
    medians = {name: median(run[name] for run in runs) for name in runs[0]}
    lines = [f"| median of {len(runs)} | seconds | added | ratio |", "|---|---:|---:|---:|"]
    for name, seconds in medians.items():
        compared = name in {*WAYS, SERVED}
        added = f"{seconds - medians[PLAIN]:+.1f}" if compared else ""
        ratio = f"{seconds / medians[PLAIN]:.2f}" if compared else ""
        lines.append(f"| {name} | {seconds:.1f} | {added} | {ratio} |")
    return "\n".join(lines)


def _clone(folder: Path, changes: Mapping[str, Any]) -> Path:
    subprocess.run(["git", "clone", "--quiet", str(Path.cwd()), str(folder)], check=True)
    given = load_parameters(folder / PARAMETERS_FILE).model_dump(mode="json")
    changed = {name: given[name] | value if isinstance(value, Mapping) else value for name, value in changes.items()}
    write_parameters(folder / PARAMETERS_FILE, folder / PARAMETERS_FILE, changed)
    return folder


def _commands(root: Path) -> list[list[str]]:
    """Module and arguments of every stage, in an order in which they can run."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        commands = {stage.addressing: str(stage.cmd) for stage in repo.index.stages}
    steps = (commands[name].split()[3:] for name in stage_graph(root))
    return [[f"tasks.{step}", *arguments] for step, *arguments in steps]


def _seconds(root: Path, command: list[str], text: str = "", **variables: str) -> float:
    start = time.perf_counter()
    _run(root, command, text, **variables)
    return time.perf_counter() - start


def _run(root: Path, command: list[str], text: str = "", **variables: str) -> str:
    """What a command prints, in an environment without settings of the caller's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    environment |= {"DVC_NO_ANALYTICS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(root), **variables}
    done = subprocess.run(command, cwd=root, env=environment, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NumpruneError(f"{' '.join(command[:3])} failed in {root}:\n{done.stdout}\n{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    run_step(overhead)
