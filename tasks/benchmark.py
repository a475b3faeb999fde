"""Step `benchmark`: what the dense and the pruned model cost, measured in turn in one run."""

import json
import platform
from collections import defaultdict
from dataclasses import asdict

import torch

from numprune.checkpoint import load_model
from numprune.device import resolve_device
from numprune.files import replace_on_success
from numprune.generation_benchmark import cost, timed_generations
from numprune.progress import track
from tasks.layout import benchmark_file, checkpoint_folder, model_folder
from tasks.parameters import load_parameters
from tasks.step import run_step


def benchmark(model: str, budget: str) -> None:
    """Measures size, memory and generation speed of a model, dense and pruned."""
    parameters = load_parameters()
    settings = parameters.benchmark
    device = str(resolve_device(parameters.compute.device))
    folders = {"dense": model_folder(model), "pruned": checkpoint_folder(model, budget)}
    work = {"prompt_length": settings.prompt_length, "new_tokens": settings.new_tokens}
    seconds: dict[str, list[float]] = defaultdict(list)
    models = {name: load_model(folder, device=device) for name, folder in folders.items()}
    timings = timed_generations(models, **work, repeats=settings.repeats)
    for name, taken in track(timings, len(folders) * settings.repeats, "benchmark"):
        seconds[name].append(taken)
    metrics = {
        name: {**asdict(cost(folder, seconds[name], **work, device=device)), "seconds": seconds[name]}
        for name, folder in folders.items()
    }
    protocol = {
        **work,
        "repeats": settings.repeats,
        "batch": 1,
        "dtype": str(models["dense"].dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    with replace_on_success(benchmark_file(model, budget)) as temporary:
        temporary.write_text(json.dumps({**metrics, "protocol": protocol}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(benchmark)
