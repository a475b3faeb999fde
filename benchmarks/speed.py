"""How long pruning takes beside what the machine allows: every phase against its floor, on a random model of a shape.

python -m benchmarks.speed --help
"""

import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from numprune.architectures import decoder_blocks, linear, prunable_groups
from numprune.budget import Budget, to_remove
from numprune.checkpoint import load_shapes, open_model
from numprune.choice import choose_units, rank_model
from numprune.cutting import cut, twin
from numprune.device import resolve_device
from numprune.plan import Choice
from numprune.pruning import capture_to
from numprune.ranks import add_up, is_first, meet, ranks
from numprune.recipe import RECIPES, Recipe
from numprune.shards import INDEX
from numprune.statistics import Measured
from tasks.step import run_step

Row = dict[str, Any]
Shape = Literal["tiny", "llama-1b", "llama-7b", "llama-70b"]

# Hidden, intermediate, layers, heads, key/value heads, vocabulary: of the LLaMA models of that size.
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    "tiny": (256, 704, 8, 8, 4, 2000),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-70b": (8192, 28672, 80, 64, 8, 32000),
}
FLAP = Recipe(selection="flap", allocation="global", recovery="bias")


def speed(
    *,
    shape: Annotated[Shape, typer.Option(help="Of the model.")] = "tiny",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Fewer than the shape has; nothing is extrapolated.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that are computed together.")] = 8,
    planning_tokens: Annotated[int, typer.Option(min=1, help="That rises are measured on.")] = RECIPES[
        "best"
    ].planning_tokens,
    ratio: Annotated[float, typer.Option(help="Share to remove.")] = 0.3,
    scaling: Annotated[bool, typer.Option(help="Also halve layers, width and tokens, and plot.")] = False,
    profile: Annotated[bool, typer.Option(help="Also write traces of torch.profiler, one a phase.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the model and the results.")] = Path("report/speed"),
) -> None:
    """Times capture, score, plan and compensate of both presets, and FLAP's, on the same streaming.

    Started by `torchrun`, it measures with so many processes.
    """
    place = resolve_device(device)
    ceilings = Ceilings.measured(place)
    if is_first():
        print(ceilings)
    base = Case(shape, layers or SHAPES[shape][2], 1.0, samples, length)
    cases = [base]
    if scaling:
        cases += [replace(base, layers=max(1, base.layers // 2)), replace(base, width=0.5)]
        cases += [replace(base, samples=max(1, base.samples // 2))]
    rows: list[Row] = []
    output.mkdir(parents=True, exist_ok=True)
    for case in cases:
        with _shared_folder(output / ".random-model") as folder:
            traces = output if profile and is_first() else None
            bench = Bench(case, folder, place, batch_size=batch_size, planning=planning_tokens, traces=traces)
            for name, recipe in (("best", RECIPES["best"]), ("paper", RECIPES["paper"]), ("FLAP", FLAP)):
                for row in bench.phases(name, replace(recipe, planning_tokens=planning_tokens), ratio, ceilings):
                    rows.append(row)
                    if is_first():
                        print(_line(row), flush=True)
    if not is_first():
        return
    hardware = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or "cpu"
    result = {"hardware": hardware, "threads": torch.get_num_threads(), "ceilings": ceilings.__dict__, "rows": rows}
    (output / "speed.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (output / "speed.md").write_text("\n".join([*_HEAD, *map(_line, rows)]) + "\n", encoding="utf-8")
    if scaling:
        _plot(rows, output / "scaling.png")


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches.

    Attributes:
        model: Operations a second of matrix products in the type that the model computes in.
        double: The same in float64, in which equations are solved.
        memory: Bytes a second of a copy, read and written.
        reading: Bytes a second from a file that was just written.
        sums: Bytes a second that are added up over all ranks; None if there is one.
    """

    model: float
    double: float
    memory: float
    reading: float
    sums: float | None

    @classmethod
    def measured(cls, device: torch.device) -> "Ceilings":
        """Times large products, a copy, and the reading of a file."""
        size = 8192 if device.type == "cuda" else 2048
        of_type = {}
        for dtype in (_dtype(device), torch.float64):
            left = torch.randn(size, size, device=device, dtype=dtype)
            of_type[dtype] = 2 * size**3 / _seconds(partial(torch.mm, left, left), device)
        block = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
        # Into memory that is there: on a CPU new pages take longer than the copy.
        memory = 2 * block.nbytes / _seconds(partial(torch.zeros_like(block).copy_, block), device)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "block"
            file.write_bytes(bytes(2**27))
            reading = 2**27 / _seconds(file.read_bytes, device)
        sums = block.nbytes / _seconds(partial(add_up, block), device) if ranks() > 1 else None
        return cls(of_type[_dtype(device)], of_type[torch.float64], memory, reading, sums)

    def __str__(self) -> str:
        return (
            f"ceilings: {self.model / 1e9:.0f} GFLOP/s, {self.double / 1e9:.0f} GFLOP/s in float64, "
            f"copy {self.memory / 1e9:.1f} GB/s, file {self.reading / 1e9:.1f} GB/s"
            + (f", sums over {ranks()} ranks {self.sums / 1e9:.2f} GB/s" if self.sums else "")
        )


@dataclass(frozen=True)
class Case:
    """One model and calibration."""

    shape: str
    layers: int
    width: float
    samples: int
    length: int

    @property
    def config(self) -> LlamaConfig:
        """Of the model."""
        hidden, intermediate, _, heads, keys, vocabulary = SHAPES[self.shape]
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=int(hidden * self.width),
            intermediate_size=int(intermediate * self.width),
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, int(heads * self.width)),
            num_key_value_heads=max(1, int(keys * self.width)),
            head_dim=hidden // heads,
            max_position_embeddings=max(self.length, 2048),
        )


class Bench:
    """A random model of a shape in a folder of shards, and the phases of pruning it."""

    def __init__(
        self, case: Case, folder: Path, device: torch.device, *, batch_size: int, planning: int, traces: Path | None
    ) -> None:
        self._case, self._folder, self._device, self._traces = case, folder, device, traces
        if is_first():
            write_random(case.config, folder / "model", _dtype(device))
        meet()
        self._model = open_model(folder / "model", dtype=_dtype(device))
        generator = torch.Generator().manual_seed(0)
        shape = (case.samples, case.length)
        ids = torch.randint(case.config.vocab_size, shape, generator=generator)
        self._measured = Measured(folder / "statistics", ids, batch_size, device)
        self._planning = planning
        self._captured = False

    def phases(self, name: str, recipe: Recipe, ratio: float, ceilings: Ceilings) -> Iterator[Row]:
        """Runs capture, score, plan and compensate by a recipe; what the others have captured is captured once."""
        work = Work.of(self._model, self._case, self._planning, ratio)
        if not self._captured:
            done = self._time(lambda: list(self._capture()), "capture")
            self._captured = True
            yield self._row("all", "capture", done, work.capture(ceilings))
        rankings: dict[str, Any] = {}

        def score() -> None:
            rankings.update(rank_model(self._model, recipe, self._measured))

        done = self._time(score, f"{name}-score")
        yield self._row(name, "score", done, work.score(recipe, ceilings))
        choices: list[Choice] = []

        def plan() -> None:
            costs, amount = to_remove(load_shapes(self._folder / "model"), Budget("ratio", ratio))
            choices.append(choose_units(self._model, recipe, costs, amount, self._measured, rankings=rankings))

        yield self._row(name, "plan", self._time(plan, f"{name}-plan"), 0.0)
        pruned = twin(self._model)
        target = self._folder / f"pruned-{name}"
        target.mkdir(exist_ok=True)

        def compensate() -> None:
            for _ in cut(
                pruned, choices[0].kept, self._measured, recovery=recipe.recovery, damping=recipe.damping, work=target
            ):
                pass

        done = self._time(compensate, f"{name}-compensate")
        meet()
        if is_first():
            shutil.rmtree(target)  # Those of all recipes together take twice the model.
        yield self._row(name, "compensate", done, work.compensate(recipe, ceilings))

    def _capture(self) -> Iterator[int]:
        measured = self._measured
        return capture_to(
            measured.statistics, self._model, measured.samples, batch_size=measured.batch_size, device=self._device
        )

    def _time(self, run: Callable[[], object], name: str) -> tuple[float, int]:
        """Seconds and peak bytes: of the device, or of this process's memory on a CPU."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _reset_peak()
        traced = torch.profiler.profile() if self._traces else nullcontext()
        start = time.perf_counter()
        with traced as trace:
            run()
            _wait(self._device)
        seconds = time.perf_counter() - start
        if self._traces and trace is not None:
            trace.export_chrome_trace(str(self._traces / f"{name}.json"))
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _peak()
        return seconds, peak

    def _row(self, recipe: str, phase: str, done: tuple[float, int], floor: float) -> Row:
        seconds, peak = done
        case = {"shape": self._case.shape, "layers": self._case.layers, "width": self._case.width}
        tokens = self._case.samples * self._case.length
        return {
            **case,
            "ranks": ranks(),
            "tokens": tokens,
            "recipe": recipe,
            "phase": phase,
            "seconds": seconds,
            "floor": floor,
            "peak": peak,
        }


@dataclass(frozen=True)
class Work:
    """Operations and bytes that a phase cannot do without, of one rank; docs/scaling.md says how they come about."""

    layers: int
    block: int
    block_bytes: int
    head: int
    tokens: float
    planning: int
    consumers: list[tuple[int, int]]
    ratio: float

    @classmethod
    def of(cls, model: PreTrainedModel, case: Case, planning: int, ratio: float) -> "Work":
        """Of a model and its calibration."""
        block = decoder_blocks(model)[0]
        layers = (linear(block, group.consumer) for group in prunable_groups(model)[0])
        parameters = sum(parameter.numel() for parameter in block.parameters())
        return cls(
            layers=case.layers,
            block=parameters,
            block_bytes=sum(parameter.nbytes for parameter in block.parameters()),
            head=model.get_output_embeddings().weight.numel(),
            tokens=case.samples * case.length / ranks(),
            planning=min(max(1, planning // case.length), case.samples) * case.length,
            consumers=[(layer.in_features, layer.out_features) for layer in layers],
            ratio=ratio,
        )

    def capture(self, ceilings: Ceilings) -> float:
        """Each token through each block, and half of the symmetric G of each consumer: D^2 a token."""
        forward = 2 * self.block * self.tokens
        grams = sum(size**2 * self.tokens for size, _ in self.consumers)
        summed = sum(8 * size**2 for size, _ in self.consumers)
        return self.layers * self._floor(forward + grams, summed, ceilings)

    def score(self, recipe: Recipe, ceilings: Ceilings) -> float:
        """W^T W and a factorisation, or an inverse and its updates; for rises four trials a block beside the model."""
        solves, rows = {"obs": (2.0, 2), "newton": (1 / 3, 1)}.get(recipe.selection, (0.0, 0))
        double = sum(solves * size**3 + rows * size**2 * out for size, out in self.consumers)
        seconds = self.layers * double / ceilings.double
        if recipe.allocation == "loss_aware":
            # The model itself, and its trials, which the ranks share; each ends with the head.
            passes = self.layers + (2 * self.layers * (self.layers + 2) - self.layers) / ranks()
            ends = 1 + 4 * self.layers / ranks()
            seconds += 2 * self.planning * (self.block * passes + self.head * ends) / ceilings.model
        return seconds

    def compensate(self, recipe: Recipe, ceilings: Ceilings) -> float:
        """Both streams through each block; sums and a factorisation of what stays of every consumer."""
        if recipe.recovery == "bias":
            return self.layers * 2 * self.block_bytes / ceilings.memory
        kept = [(size * (1 - self.ratio), out) for size, out in self.consumers]
        solve = sum(size**3 / 3 + 2 * size**2 * out for size, out in kept) / ceilings.double
        if recipe.recovery == "least_squares":
            return self.layers * solve
        forward = 2 * self.block * (2 - self.ratio) * self.tokens
        sums = sum((size**2 + 2 * size * out) * self.tokens for size, out in kept)
        summed = sum(8 * (size**2 + size * out) for size, out in kept)
        return self.layers * (self._floor(forward + sums, summed, ceilings) + solve)

    def _floor(self, operations: float, summed: float, ceilings: Ceilings) -> float:
        seconds = max(operations / ceilings.model, self.block_bytes / ceilings.reading)
        return seconds + (summed / ceilings.sums if ceilings.sums else 0.0)


@contextmanager
def _shared_folder(folder: Path) -> Iterator[Path]:
    """A folder that all ranks see while they need it."""
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)  # Of a run that was killed.
        folder.mkdir()
    meet()
    try:
        yield folder
    finally:
        meet()
        if is_first():
            shutil.rmtree(folder)


def write_random(config: LlamaConfig, folder: Path, dtype: torch.dtype) -> None:
    """Writes a random model of a configuration, a file a block, with no more than one of them in memory."""
    folder.mkdir(parents=True)
    config.dtype = dtype
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    files: dict[str, list[str]] = {}
    for name in state:
        part = name.split(".")
        files.setdefault(f"block-{part[2]}.safetensors" if "layers" in part else "outside.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in files.items():
        save_file({name: _random(state[name], generator, dtype) for name in names}, folder / file, {"format": "pt"})
    where = {name: file for file, names in files.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")


def _random(shape: Tensor, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    if shape.ndim == 1:
        return torch.ones(shape.shape, dtype=dtype)
    return (torch.randn(shape.shape, generator=generator) / shape.shape[1] ** 0.5).to(dtype)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    run()
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


_HEAD = (
    "| model | tokens | recipe | phase | seconds | floor | ratio | peak memory |",
    "|---|---:|---|---|---:|---:|---:|---:|",
)


def _line(row: Row) -> str:
    model = f"{row['shape']}, {row['layers']} layers, width {row['width']:g}, {row['ranks']} rank(s)"
    floor = f"{row['floor']:.2f} | {row['seconds'] / row['floor']:.1f}" if row["floor"] else " | "
    peak = f"{row['peak'] / 2**30:.2f} GiB"
    return f"| {model} | {row['tokens']} | {row['recipe']} | {row['phase']} | {row['seconds']:.2f} | {floor} | {peak} |"


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds of each phase, and its floor (dashed), against what was halved, with both axes logarithmic."""
    import matplotlib.pyplot as plt

    base = rows[0]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    for axis, quantity in zip(axes, ("layers", "width", "tokens"), strict=True):
        others = [key for key in ("layers", "width", "tokens") if key != quantity]
        varied = [
            row for row in rows if all(row[key] == base[key] for key in others) and row["recipe"] in {"all", "best"}
        ]
        for phase in ("capture", "score", "compensate"):
            points = sorted((row[quantity], row["seconds"], row["floor"]) for row in varied if row["phase"] == phase)
            values, seconds, floors = zip(*points, strict=True)
            (line,) = axis.loglog(values, seconds, "o-", label=phase)
            axis.loglog(values, floors, "--", color=line.get_color())
        axis.set_xticks(values, map(str, values))
        axis.minorticks_off()
        axis.set_xlabel(quantity)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    run_step(speed)
