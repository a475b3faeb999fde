"""What a pruned model saves: parameters, bytes, memory and generation speed, dense and pruned in one run."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.checkpoint import load_model, weight_bytes


@dataclass(frozen=True)
class Cost:
    """What it costs to hold and to run a model.

    Attributes:
        parameters: Of the whole model, tied weights once.
        checkpoint_bytes: Of its safetensors files.
        peak_memory_bytes: What loading and one generation add: the allocator's peak on a GPU, resident memory of a
            process of its own on a CPU.
        tokens_per_second: Median over the repeats.
    """

    parameters: int
    checkpoint_bytes: int
    peak_memory_bytes: int
    tokens_per_second: float


@torch.no_grad()
def timed_generations(
    models: Mapping[str, PreTrainedModel],
    *,
    batch: int = 1,
    prompt_length: int,
    new_tokens: int,
    repeats: int,
    seed: int = 0,
) -> Iterator[tuple[str, float]]:
    """Generates greedily with several models in turn, so that drift of the machine hits all; yields name and seconds.

    One generation of each model warms up and is not yielded. The prompt is random tokens and no end token stops the
    generation: all models do the same work. Every sequence of a batch has the same prompt.
    """
    for repeat in range(repeats + 1):
        for name, model in models.items():
            prompt = _prompt(model, batch, prompt_length, seed)
            _synchronize(model)
            start = time.perf_counter()
            generate(model, prompt, new_tokens)
            _synchronize(model)
            if repeat:
                yield name, time.perf_counter() - start


def generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> Tensor:
    """Greedy generation of exactly `new_tokens` tokens."""
    generator: Any = model
    generated: Tensor = generator.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return generated


def cost(folder: Path, seconds: list[float], *, prompt_length: int, new_tokens: int, device: str) -> Cost:
    """Sums up what one model costs; its memory is measured in a process of its own."""
    # A fresh interpreter: what this process holds must not count.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        parameters, memory = process.submit(_measure_memory, folder, prompt_length, new_tokens, device).result()
    return Cost(
        parameters=parameters,
        checkpoint_bytes=weight_bytes(folder),
        peak_memory_bytes=memory,
        tokens_per_second=new_tokens / statistics.median(seconds),
    )


def _measure_memory(folder: Path, prompt_length: int, new_tokens: int, device: str) -> tuple[int, int]:
    before = _restart_peak_resident_bytes()
    model = load_model(folder, device=device)
    generate(model, _prompt(model, 1, prompt_length, seed=0), new_tokens)
    on_gpu = model.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else _peak_resident_bytes() - before
    return model.num_parameters(), peak


def _restart_peak_resident_bytes() -> int:
    """Lets the peak begin anew at what is resident now, where the system can (Linux), and returns it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: there a process starts from the peak of the one that started it.
        (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _prompt(model: PreTrainedModel, batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    return prompt.expand(batch, -1).to(model.device)


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
