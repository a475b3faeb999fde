"""Step `benchmark`: what the dense and the pruned model cost, measured in turn, beside what is to be expected."""

import json
import platform
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from numprune.checkpoint import load_config, load_model, weight_bytes
from numprune.device import resolve_device
from numprune.files import replace_on_success
from numprune.generation_benchmark import Timing, count_work, peak_memory, timed_generations
from numprune.images import writes_images
from numprune.progress import track
from tasks.layout import benchmark_file, checkpoint_folder, model_folder
from tasks.parameters import Benchmark, load_parameters
from tasks.step import run_step


def benchmark(model: str, budget: str) -> None:
    """Measures size, memory and generation speed of a model, dense and pruned.

    The first batch and prompt length are the ones whose figures stand in tables; all are in the file.
    """
    parameters = load_parameters()
    settings = _fitting(parameters.benchmark, load_config(model_folder(model)))
    device = str(resolve_device(parameters.compute.device))
    folders = {"dense": model_folder(model), "pruned": checkpoint_folder(model, budget)}
    models = {name: load_model(folder, device=device) for name, folder in folders.items()}
    workloads = [
        _workload(models, settings, batch, length)
        for batch, length in product(settings.batches, settings.prompt_lengths)
    ]
    first = workloads[0]
    memory = _peak_memory(list(folders.values()), settings, device)
    costs = {
        name: _cost(folder, settings) | {"peak_memory_bytes": peak} | first[name]
        for (name, folder), peak in zip(folders.items(), memory, strict=True)
    }
    result = {
        **costs,
        "ratios": _ratios(costs["dense"], costs["pruned"]),
        "workloads": workloads,
        "protocol": {
            "prompt_length": first["prompt_length"],
            "new_tokens": settings.new_tokens,
            "repeats": settings.repeats,
            "batch": first["batch"],
            "dtype": str(models["dense"].dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device)
            if device.startswith("cuda")
            else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "compiled": settings.compile,
            "versions": {name: version(name) for name in ("numprune", "torch", "transformers")},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }
    with replace_on_success(benchmark_file(model, budget)) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _fitting(settings: Benchmark, config: PreTrainedConfig) -> Benchmark:
    """A model of images has one workload: a condition in, a whole image out."""
    if not writes_images(config):
        return settings
    workload = {"prompt_lengths": [config.condition_tokens], "new_tokens": config.grid_size**2}
    return settings.model_copy(update=workload)


def _workload(models: Mapping[str, PreTrainedModel], settings: Benchmark, batch: int, length: int) -> dict[str, Any]:
    timings: dict[str, list[Timing]] = defaultdict(list)
    generations = timed_generations(
        models,
        batch=batch,
        prompt_length=length,
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        compiled=settings.compile,
    )
    title = f"benchmark batch {batch} prompt {length}"
    for name, timing in track(generations, len(models) * settings.repeats, title):
        timings[name].append(timing)
    return {"batch": batch, "prompt_length": length, **{name: _summed_up(timings[name]) for name in models}}


def _summed_up(timings: list[Timing]) -> dict[str, Any]:
    """Medians over the repeats, and every total, which says how far they spread."""
    return {
        "tokens_per_second": statistics.median(timing.tokens_per_second for timing in timings),
        "prefill_tokens_per_second": statistics.median(timing.prefill_tokens_per_second for timing in timings),
        "seconds_to_first_token": statistics.median(timing.first_token for timing in timings),
        "seconds_per_token": statistics.median(timing.seconds_per_token for timing in timings),
        "seconds": [timing.total for timing in timings],
    }


def _peak_memory(folders: Sequence[Path], settings: Benchmark, device: str) -> list[int]:
    """Measured in a process for each model, which takes longer to start than to measure."""

    def measure(folder: Path) -> int:
        batch, length = settings.batches[0], settings.prompt_lengths[0]
        return peak_memory(folder, batch=batch, prompt_length=length, new_tokens=settings.new_tokens, device=device)

    # Threads do nothing but wait: transformers sets the data type of the whole process where it makes a model.
    with ThreadPoolExecutor(len(folders) if device == "cpu" else 1) as side_by_side:
        return list(side_by_side.map(measure, folders))


def _cost(folder: Path, settings: Benchmark) -> dict[str, Any]:
    length, new_tokens = settings.prompt_lengths[0], settings.new_tokens
    # On average, half of the new tokens are in the context.
    work = count_work(folder, length + new_tokens // 2)
    return {
        **asdict(work),
        "cache_bytes": work.cache_bytes_per_token * (length + new_tokens) * settings.batches[0],
        "checkpoint_bytes": weight_bytes(folder),
    }


def _ratios(dense: Mapping[str, float], pruned: Mapping[str, float]) -> dict[str, float]:
    """Dense over pruned: the measured speed-ups, and those that bytes and operations let one expect.

    At batch 1 a token takes the time to read all weights, so bytes limit it; a long prompt is limited by operations.
    """
    return {
        "speed_up": pruned["tokens_per_second"] / dense["tokens_per_second"],
        "prefill_speed_up": pruned["prefill_tokens_per_second"] / dense["prefill_tokens_per_second"],
        "expected_by_bytes": dense["bytes_per_token"] / pruned["bytes_per_token"],
        "expected_by_flops": dense["flops_per_token"] / pruned["flops_per_token"],
    }


if __name__ == "__main__":
    run_step(benchmark)
