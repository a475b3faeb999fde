"""How long pruning takes beside what the machine allows: every phase against its floor, on a random model of a shape.

python -m benchmarks.speed --help
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.floor import Ceilings, Work, model_dtype, wait_for
from benchmarks.measuring import BatchSize, Device
from numprune.budget import Budget, to_remove
from numprune.checkpoint import load_shapes, open_model
from numprune.choice import choose_units, rank_model
from numprune.cutting import cut, twin
from numprune.device import resolve_device
from numprune.plan import Choice
from numprune.pruning import capture_to
from numprune.ranks import is_first, meet, ranks
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
    device: Device = "auto",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Fewer than the shape has; nothing is extrapolated.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 256,
    batch_size: BatchSize = None,
    planning_tokens: Annotated[int, typer.Option(min=1, help="That rises are measured on.")] = RECIPES[
        "best"
    ].planning_tokens,
    ratio: Annotated[float, typer.Option(help="Share to remove.")] = 0.3,
    repeats: Annotated[
        int, typer.Option(min=1, help="Runs of everything; shown are medians, and the highest peaks.")
    ] = 1,
    scaling: Annotated[
        bool, typer.Option(help="Also a half and a quarter of layers, width and tokens, and more ranks; plots.")
    ] = False,
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
    for part in (2, 4) if scaling else ():
        cases += [replace(base, layers=max(1, base.layers // part)), replace(base, width=1 / part)]
        cases += [replace(base, samples=max(1, base.samples // part))]
    rows: list[Row] = []
    output.mkdir(parents=True, exist_ok=True)
    for case in cases:
        runs: list[list[Row]] = [[] for _ in range(repeats)]
        for run in runs:
            with _shared_folder(output / ".random-model") as folder:
                traces = output if profile and is_first() else None
                bench = Bench(case, folder, place, batch_size=batch_size, planning=planning_tokens, traces=traces)
                for number, row in enumerate(bench.rows(ratio, ceilings)):
                    run.append(row)
                    if run is runs[-1]:
                        rows.append(_together([other[number] for other in runs]))
                        if is_first():
                            print(_line(rows[-1]), flush=True)
                del bench  # Before the next one comes.
    if not is_first():
        return
    by_ranks: list[Row] = []
    if scaling:
        given = {"shape": shape, "device": device, "layers": base.layers, "samples": samples, "length": length}
        given |= {"planning-tokens": planning_tokens, "ratio": ratio, "repeats": repeats, "output": output / "ranks"}
        given |= {"batch-size": batch_size} if batch_size else {}
        by_ranks = _of_ranks(place, [f"--{name}={value}" for name, value in given.items()], output / "ranks")
    hardware = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or "cpu"
    result = {"hardware": hardware, "threads": torch.get_num_threads(), "ceilings": ceilings.__dict__, "rows": rows}
    result |= {"by_ranks": by_ranks}
    (output / "speed.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (output / "speed.md").write_text("\n".join([*_HEAD, *map(_line, rows + by_ranks)]) + "\n", encoding="utf-8")
    if scaling:
        _plot(rows, by_ranks, output / "scaling.png")


def _of_ranks(place: torch.device, options: Sequence[str], output: Path) -> list[Row]:
    """The same in 1, 2, 4, ... processes, each with a GPU or with the same number of a CPU's cores."""
    most = torch.cuda.device_count() if place.type == "cuda" else torch.get_num_threads()
    counts = [2**power for power in range(most.bit_length())]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // counts[-1]))}
    rows: list[Row] = []
    for count in counts:
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "benchmarks.speed"]
        subprocess.run([sys.executable, "-m", *launch, *options], env=environment, check=True)
        rows += json.loads((output / "speed.json").read_text(encoding="utf-8"))["rows"]
    shutil.rmtree(output)
    return rows


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
        self,
        case: Case,
        folder: Path,
        device: torch.device,
        *,
        batch_size: int | None,
        planning: int,
        traces: Path | None,
    ) -> None:
        self._case, self._folder, self._device, self._traces = case, folder, device, traces
        self._before = 0 if device.type == "cuda" else _memory("VmRSS")
        if is_first():
            write_random(case.config, folder / "model", model_dtype(device))
        meet()
        self._model = open_model(folder / "model", dtype=model_dtype(device))
        generator = torch.Generator().manual_seed(0)
        shape = (case.samples, case.length)
        ids = torch.randint(case.config.vocab_size, shape, generator=generator)
        self._measured = Measured(folder / "statistics", ids, batch_size, device)
        self._planning = planning
        self._captured = False

    def rows(self, ratio: float, ceilings: Ceilings) -> Iterator[Row]:
        """Runs all phases of both presets and of FLAP."""
        for name, recipe in (("best", RECIPES["best"]), ("paper", RECIPES["paper"]), ("FLAP", FLAP)):
            yield from self._phases(name, replace(recipe, planning_tokens=self._planning), ratio, ceilings)

    def _phases(self, name: str, recipe: Recipe, ratio: float, ceilings: Ceilings) -> Iterator[Row]:
        """Runs capture, score, plan and compensate by a recipe; what the others have captured is captured once."""
        work = Work.of(self._model, self._measured, self._planning, ratio)
        if not self._captured:
            done = self._time(lambda: list(self._capture()), "capture")
            self._captured = True
            yield self._row("all", "capture", done, work.capture(ceilings), work.memory("capture", recipe))
        rankings: dict[str, Any] = {}

        def score() -> None:
            rankings.update(rank_model(self._model, recipe, self._measured))

        done = self._time(score, f"{name}-score")
        yield self._row(name, "score", done, work.score(recipe, ceilings), work.memory("score", recipe))
        choices: list[Choice] = []

        def plan() -> None:
            costs, amount = to_remove(load_shapes(self._folder / "model"), Budget("ratio", ratio))
            choices.append(choose_units(self._model, recipe, costs, amount, self._measured, rankings=rankings))

        yield self._row(name, "plan", self._time(plan, f"{name}-plan"), 0.0, 0.0)
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
        yield self._row(name, "compensate", done, work.compensate(recipe, ceilings), work.memory("compensate", recipe))

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
            wait_for(self._device)
        seconds = time.perf_counter() - start
        if self._traces and trace is not None:
            trace.export_chrome_trace(str(self._traces / f"{name}.json"))
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _memory("VmHWM")
        return seconds, peak

    def _row(self, recipe: str, phase: str, done: tuple[float, int], floor: float, memory: float) -> Row:
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
            "formula": self._before + memory if memory else 0.0,
        }


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


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _memory(name: str) -> int:
    """Bytes of this process: VmRSS, what it has in memory now, or VmHWM, the most since `_reset_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


_HEAD = (
    "| model | tokens | recipe | phase | seconds | floor | ratio | peak memory | by formula |",
    "|---|---:|---|---|---:|---:|---:|---:|---:|",
)


def _together(rows: Sequence[Row]) -> Row:
    """One row of several runs."""
    # The formula of that run, too: it begins with what the process had before.
    highest = max(rows, key=lambda row: row["peak"])
    return {**highest, "seconds": statistics.median(row["seconds"] for row in rows)}


def _line(row: Row) -> str:
    model = f"{row['shape']}, {row['layers']} layers, width {row['width']:g}, {row['ranks']} rank(s)"
    floor = f"{row['floor']:.2f} | {row['seconds'] / row['floor']:.1f}" if row["floor"] else " | "
    formula = f"{row['formula'] / 2**30:.2f} GiB" if row["formula"] else ""
    cells = [model, row["tokens"], row["recipe"], row["phase"], f"{row['seconds']:.2f}", floor]
    return f"| {' | '.join(map(str, cells))} | {row['peak'] / 2**30:.2f} GiB | {formula} |"


def _plot(rows: Sequence[Row], by_ranks: Sequence[Row], path: Path) -> None:
    """Seconds of each phase, and its floor (dashed), against what was varied, with both axes logarithmic."""
    import matplotlib.pyplot as plt

    quantities = ("layers", "width", "tokens")
    panels = {
        quantity: [row for row in rows if all(row[key] == rows[0][key] for key in quantities if key != quantity)]
        for quantity in quantities
    } | {"ranks": by_ranks}
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4), sharey=True)
    for axis, (quantity, varied) in zip(axes, panels.items(), strict=True):
        for phase in ("capture", "score", "compensate"):
            of_phase = [row for row in varied if row["phase"] == phase and row["recipe"] in {"all", "best"}]
            points = sorted((row[quantity], row["seconds"], row["floor"]) for row in of_phase)
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
