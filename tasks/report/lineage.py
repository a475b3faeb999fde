"""Where a run comes from: files and hashes as `dvc.lock` has them, and the commands that make it anew."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from numprune.budget import parse_budget
from numprune.recipe import RECIPES, Recipe, recipe_name
from tasks.layout import model_folder
from tasks.parameters import Parameters
from tasks.report.results import Results

LOCK_FILE = Path("dvc.lock")


@dataclass(frozen=True)
class LockedFile:
    """A file or folder of a run.

    Attributes:
        stage: That made it; `source` if none did.
        path: Below the repository.
        md5: DVC's hash of it; that of a folder ends in `.dir`.
        size: Bytes.
    """

    stage: str
    path: str
    md5: str
    size: int


def locked_files(model: str, budget: str) -> list[LockedFile]:
    """The model and all that was made on the way from it to a run's metrics; nothing if there is no `dvc.lock`."""
    if not LOCK_FILE.exists():
        return []
    stages: dict[str, Any] = yaml.safe_load(LOCK_FILE.read_text(encoding="utf-8"))["stages"]
    per_model = ("calibrate", "capture", "score", "evaluate_dense")
    per_run = ("prune", "compensate", "evaluate", "benchmark")
    wanted = ["corpus", *(f"{name}@{model}" for name in per_model), *(f"{name}@{model}-{budget}" for name in per_run)]
    files = {
        entry["path"]: LockedFile(name, entry["path"], entry["md5"], entry["size"])
        for name in wanted
        for entry in stages.get(name, {}).get("outs", [])
    }
    source = str(model_folder(model))
    of_source = (dep for name in wanted for dep in stages.get(name, {}).get("deps", []) if dep["path"] == source)
    found = next(of_source, None)
    first = [LockedFile("source", source, found["md5"], found["size"])] if found else []
    return [*first, *files.values()]


def pipeline_command(model: str, budget: str) -> str:
    """What makes a run anew in a checkout with its `params.yaml`."""
    return f"dvc repro evaluate@{model}-{budget} benchmark@{model}-{budget}"


def library_command(results: Results, parameters: Parameters) -> str | None:
    """What makes the same checkpoint without the pipeline; None if the command line has no option for the recipe."""
    recipe, calibration = results.recipe, parameters.calibration
    preset = RECIPES.get(recipe_name(recipe), RECIPES["best"])
    if recipe.seed != preset.seed:
        return None
    kind, _, value = results.budget.rpartition("-")
    words = [f"--{kind or 'ratio'}", value]
    if parse_budget(results.budget).kind in {"memory", "flops", "latency"}:
        words += ["--batch", str(parameters.workload.batch), "--context", str(parameters.workload.length)]
    words += ["--recipe", next(name for name, value in RECIPES.items() if value == preset)]
    words += _overrides(recipe, preset)
    words += ["--calibration", calibration.data, "--samples", str(calibration.samples), "--seed", str(calibration.seed)]
    if calibration.length is not None:
        words += ["--length", str(calibration.length)]
    words += ["--output", "out/"]
    # An option a line.
    options = shlex.join(words).replace(" --", " \\\n  --")
    return f"numprune prune {shlex.quote(str(model_folder(results.model)))} \\\n  {options}"


def _overrides(recipe: Recipe, preset: Recipe) -> Iterator[str]:
    for settings, standard in ((recipe, preset), (recipe.shapes, preset.shapes)):
        for field in fields(settings):
            value = getattr(settings, field.name)
            if field.name == "shapes" or value == getattr(standard, field.name):
                continue
            option = f"--{field.name.replace('_', '-')}"
            if isinstance(value, bool):
                yield option if value else option.replace("--", "--no-", 1)
            else:
                yield from (option, str(value))
