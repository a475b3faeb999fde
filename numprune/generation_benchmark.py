"""What it costs to run a model: times of several models in one run, memory, operations and bytes by count."""

import contextlib
import resource
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
from transformers import CompileConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from numprune.architectures import all_groups
from numprune.budget import Budget, BudgetKind, linear_costs
from numprune.checkpoint import load_model, load_shapes


@dataclass(frozen=True)
class Timing:
    """One generation.

    Attributes:
        first_token: Seconds until the first token was there: the prompt, and one token.
        total: Seconds until the last was.
        new_tokens: Tokens generated for each sequence.
        batch: Sequences.
        prompt_length: Tokens of each prompt.
    """

    first_token: float
    total: float
    new_tokens: int
    batch: int
    prompt_length: int

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all sequences by the whole time, the prompt's included."""
        return self.batch * self.new_tokens / self.total

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of all sequences by the time to the first token."""
        return self.batch * self.prompt_length / self.first_token

    @property
    def seconds_per_token(self) -> float:
        """Mean time from one token to the next; infinite if there is only one."""
        steps = self.new_tokens - 1
        return (self.total - self.first_token) / steps if steps else float("inf")


@dataclass(frozen=True)
class Work:
    """What one generated token costs by count, batch 1.

    Attributes:
        parameters: Of the whole model, tied weights once.
        flops_per_token: Multiplications and additions, see `numprune.budget.linear_costs`.
        bytes_per_token: Weights and cached keys and values that are read.
        cache_bytes_per_token: Keys and values that one token of the context adds, where no window limits it.
    """

    parameters: int
    flops_per_token: float
    bytes_per_token: float
    cache_bytes_per_token: float


@torch.no_grad()
def timed_generations(
    models: Mapping[str, PreTrainedModel],
    *,
    batch: int = 1,
    prompt_length: int,
    new_tokens: int,
    repeats: int,
    compiled: bool = False,
    seed: int = 0,
) -> Iterator[tuple[str, Timing]]:
    """Generates greedily with several models in turn, so that drift of the machine hits all; yields name and timing.

    One generation of each model warms up, compiles where that is asked for, and is not yielded. The prompt is random
    tokens and no end token stops the generation: all models do the same work. Every sequence of a batch has the same
    prompt.

    Args:
        models: By name.
        batch: Sequences.
        prompt_length: Tokens of each prompt.
        new_tokens: Tokens to generate.
        repeats: Generations of each model.
        compiled: Whether to run what `torch.compile` makes of the models, with a key/value cache of fixed size.
        seed: Of the prompt.
    """
    if compiled:
        # All models share the code that is compiled; for each shape of all of them there is one version, and torch
        # gives up silently after a few.
        torch.compiler.reset()
    for repeat in range(repeats + 1):
        for name, model in models.items():
            prompt = _prompt(model, batch, prompt_length, seed)
            clock = _Clock(model.device)
            generate(model, prompt, new_tokens, clock, compiled=compiled)
            first, last = clock.seconds()
            if repeat:
                yield name, Timing(first, last, new_tokens, batch, prompt_length)


def generate(
    model: PreTrainedModel,
    prompt: Tensor,
    new_tokens: int,
    after_token: StoppingCriteria | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """Greedy generation of exactly `new_tokens` tokens, by compiled code if that is asked for."""
    generator: Any = model
    options: dict[str, Any] = {}
    if compiled:
        # Left to itself, transformers compiles on accelerators only.
        options = {"cache_implementation": "static", "compile_config": CompileConfig()}
        options["compile_config"]._compile_all_devices = True
    generated: Tensor = generator.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([after_token] if after_token else []),
        **options,
    )
    return generated


class _Clock(StoppingCriteria):
    """Notes the time after every token without making a GPU wait: there by events that it passes itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize(device)
        self._marks = [self._mark()]

    def __call__(self, input_ids: Any, _scores: Any, **_: Any) -> Any:
        self._marks.append(self._mark())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def seconds(self) -> tuple[float, float]:
        """From the start to the first token and to the last."""
        start, first, last = self._marks[0], self._marks[1], self._marks[-1]
        if not self._on_gpu:
            return first - start, last - start
        last.synchronize()
        return start.elapsed_time(first) / 1000, start.elapsed_time(last) / 1000

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def count_work(folder: Path, context: int) -> Work:
    """Counts what a token costs after a context of so many tokens, from the shapes of a model folder.

    Raises:
        NumpruneError: If the architecture is not supported.
    """
    model = load_shapes(folder)
    units = {group.name: group.units for group in all_groups(model)}

    def total(kind: BudgetKind, length: int) -> float:
        return linear_costs(model, Budget(kind, 1.0, batch=1, length=length)).total(units)

    read = total("memory", context)
    if not model.config.tie_word_embeddings:  # Of the embedding table of the input, one row is read.
        embedding: Any = model.get_input_embeddings()
        read -= embedding.weight.numel() * model.dtype.itemsize
    return Work(
        parameters=model.num_parameters(),
        flops_per_token=total("flops", context),
        bytes_per_token=read,
        cache_bytes_per_token=total("memory", 2) - total("memory", 1),
    )


def peak_memory(folder: Path, *, batch: int, prompt_length: int, new_tokens: int, device: str) -> int:
    """What loading a model and one generation add, in bytes, measured in a process of its own.

    The allocator's peak on a GPU, resident memory on a CPU.
    """
    # A fresh interpreter: what this process holds must not count.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measure_memory, folder, batch, prompt_length, new_tokens, device).result()


def _measure_memory(folder: Path, batch: int, prompt_length: int, new_tokens: int, device: str) -> int:
    before = _restart_peak_resident_bytes()
    model = load_model(folder, device=device)
    generate(model, _prompt(model, batch, prompt_length, seed=0), new_tokens)
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    return _peak_resident_bytes() - before


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
