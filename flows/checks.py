"""What can be checked in milliseconds, before hours of work: that everything params.yaml names is there."""

import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from numprune.errors import NumpruneError
from numprune.multimodal import HOLDERS
from tasks.accuracy import unknown_tasks
from tasks.layout import CORPUS, DIGITS, model_folder
from tasks.parameters import Parameters

# Written by the stages corpus and digits.
_MADE = {
    *(CORPUS / name for name in ("calibration.jsonl", "evaluation.jsonl")),
    *(DIGITS / name for name in ("held_out.safetensors", "reference.npz")),
}


def check_inputs(parameters: Parameters) -> None:
    """Checks models, data and packages.

    Raises:
        NumpruneError: If something is missing; it lists all of it.
    """
    mistakes = [*_models(parameters), *_data(parameters), *_tasks(parameters), *_packages(parameters)]
    mistakes += [*_compiler(parameters), *_runner(parameters)]
    if mistakes:
        raise NumpruneError("\n".join([f"params.yaml has {len(mistakes)} mistake(s):", *(f"  {m}" for m in mistakes)]))


def _models(parameters: Parameters) -> Iterator[str]:
    for name in parameters.models:
        folder = model_folder(name)
        if name in parameters.downloads:
            continue
        if not (folder / "config.json").is_file():
            yield f"models: {folder} holds no model (config.json is missing): put one there or add downloads.{name}"
        elif not any(folder.glob("*.safetensors")):
            found = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none"
            yield (
                f"models: {folder} holds no .safetensors weights (pickled weights: {found}): save the model again "
                "with `model.save_pretrained`, which writes safetensors"
            )
        elif _model_type(folder) in HOLDERS:
            yield (
                f"models: {folder} holds a language model among other parts, which the pipeline does not measure: "
                "prune it by `numprune prune`"
            )


def _model_type(folder: Path) -> str | None:
    """What `config.json` says; whether that can be read at all is for the stages to find out."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return None
    return str(config.get("model_type", "")).removeprefix("ragged_") if isinstance(config, dict) else None


def _data(parameters: Parameters) -> Iterator[str]:
    for key, name in (
        ("calibration.data", parameters.calibration.data),
        ("evaluation.data", parameters.evaluation.data),
    ):
        path = Path(name)
        if path not in _MADE and not path.is_file():
            yield (
                f"{key}: {name} is no file; the pipeline identifies data by its content, so a data set of the Hub has "
                "to be saved as .jsonl first (the command line `numprune` takes its name); WikiText2, PTB and C4 are "
                "evaluated on by evaluation.texts"
            )
    images = parameters.images
    files = {"data": images.data, "reference": images.reference, "features.weights": images.features.weights}
    for key, name in files.items():
        if Path(name) not in _MADE and not Path(name).is_file():
            yield f"images.{key}: {name} is no file"


def _tasks(parameters: Parameters) -> Iterator[str]:
    settings = parameters.evaluation
    folder = Path(settings.tasks_folder)
    if not folder.is_dir():
        yield f"evaluation.tasks_folder: there is no folder {folder}; it may be empty, but must be there"
        return
    if unknown := unknown_tasks(settings.tasks, folder):
        yield (
            f"evaluation.tasks: neither lm-eval nor {folder} has {', '.join(unknown)}; `lm-eval ls tasks` lists its own"
        )


def _compiler(parameters: Parameters) -> Iterator[str]:
    on_cpu = parameters.compute.device in {"auto", "cpu"} and not torch.cuda.is_available()
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    if parameters.benchmark.compile and on_cpu and not any(shutil.which(name) for name in compilers if name):
        yield "benchmark.compile: needs a C++ compiler on a CPU: install g++, or set CXX"


def _packages(parameters: Parameters) -> Iterator[str]:
    for key in ("calibration", "evaluation"):
        missing = [name for name in getattr(parameters.corpus, key) if find_spec(name) is None]
        if missing:
            yield f"corpus.{key}: {', '.join(missing)} not installed: run `make setup`"


def _runner(parameters: Parameters) -> Iterator[str]:
    if parameters.orchestration.runner == "threads":
        return
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is None:
        yield (
            "orchestration.runner: dask needs a Prefect server that its workers reach too: start one (`make servers`) "
            "and set PREFECT_API_URL to its address"
        )
