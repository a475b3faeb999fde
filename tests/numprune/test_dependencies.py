"""Pruning and the benchmarks for a GPU need torch, transformers, safetensors and typer, and nothing of the pipeline."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of the pipeline, of plots and of data sets.
ABSENT = [
    "accelerate",
    "datasets",
    "distributed",
    "dvc",
    "fastapi",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "mlflow",
    "pandas",
    "PIL",
    "prefect",
    "pydantic",
    "ruamel",
    "scipy",
    "sklearn",
    "sqlalchemy",
]
RUN = f"""
import builtins
import runpy
import sys

imported = builtins.__import__


def without(name, variables=None, *rest, **options):
    # What others import is up to them: typer takes pydantic, in some versions.
    ours = (variables or {{}}).get("__name__", "").partition(".")[0] in ("numprune", "tasks", "benchmarks", "__main__")
    if ours and name.partition(".")[0] in {ABSENT}:
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return imported(name, variables, *rest, **options)


builtins.__import__ = without
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("module", ["benchmarks.speed", "benchmarks.generation", "benchmarks.precision"])
def test_benchmarks_start_without_the_pipeline(module):
    command = [sys.executable, "-c", RUN, module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--device" in done.stdout


def test_a_model_is_pruned_without_the_pipeline(make_checkpoint, text_file, tmp_path):
    script = tmp_path / "prune.py"
    script.write_text("from numprune.cli import main\n\nmain()\n", encoding="utf-8")
    options = ["--ratio", "0.3", "--calibration", text_file, "--samples", "4", "--length", "32"]
    code = RUN.replace("run_module(sys.argv.pop(1)", "run_path(sys.argv.pop(1)")
    command = [sys.executable, "-c", code, script, "prune", make_checkpoint(), *options, "--output", tmp_path / "out"]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "parameters are gone" in done.stdout
