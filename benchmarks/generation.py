"""How much faster pruned models generate, beside the speed-up that their bytes predict; on a random model of a shape.

python -m benchmarks.generation --help
"""

import json
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import typer

from benchmarks.speed import SHAPES, Case, Ceilings, Row, Shape, write_random
from numprune.architectures import all_groups
from numprune.checkpoint import load_model
from numprune.device import resolve_device
from numprune.generation_benchmark import count_work, timed_generations
from numprune.plan import Choice, Source, make_plan
from numprune.progress import track
from numprune.pruning import apply_plan
from numprune.recipe import Recipe
from numprune.saving import save_pruned
from tasks.step import run_step

Widths = Literal["equal", "different"]
_COLUMNS = ("model", "removed", "widths", "tokens/s", "speed-up", "predicted", "reached", "GB/s", "of a copy")


def generation(
    *,
    shape: Annotated[Shape, typer.Option(help="Of the model.")] = "llama-1b",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Fewer than the shape has; nothing is extrapolated.")
    ] = None,
    ratios: Annotated[str, typer.Option(help="Shares to remove.")] = "0.2,0.5",
    channels: Annotated[int, typer.Option(min=1, help="Kept MLP channels are a multiple of this.")] = 64,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the weights.")] = "bfloat16",
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Generations of each model.")] = 5,
    compiled: Annotated[bool, typer.Option(help="With torch.compile and a cache of fixed size.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("report/generation"),
) -> None:
    """Generates greedily at batch 1, all models in turn, and prints medians.

    A token at batch 1 takes the time to read all weights, so the bytes of the dense model over those of a pruned one
    predict the speed-up. *Reached* is the measured speed-up over the predicted one. Which units go does not matter to
    the speed: the first ones stay.
    """
    place = resolve_device(device)
    config = Case(shape, layers or SHAPES[shape][2], 1.0, 1, prompt_length + new_tokens).config
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as work:
        dense = Path(work) / "dense"
        write_random(config, dense, getattr(torch, dtype))
        folders = {(0.0, "equal"): dense}
        shares = [float(ratio) for ratio in ratios.split(",")]
        for ratio, widths in product(shares, get_args(Widths)):
            folders[ratio, widths] = Path(work) / f"{ratio}-{widths}"
            _prune(dense, folders[ratio, widths], ratio, widths, channels)
        measured = _measure(
            folders,
            device=place,
            prompt_length=prompt_length,
            new_tokens=new_tokens,
            repeats=repeats,
            compiled=compiled,
        )
        rows = list(measured)
    ceilings = Ceilings.measured(place)
    hardware = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or "cpu"
    name = f"{shape}, {config.num_hidden_layers} layers, {dtype}" + (", compiled" if compiled else "")
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---:|---|" + "---:|" * 6, *(_line(name, r, ceilings) for r in rows)]
    result = {"model": name, "hardware": hardware, "threads": torch.get_num_threads(), "rows": rows}
    (output / "generation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (output / "generation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _prune(dense: Path, target: Path, ratio: float, widths: Widths, channels: int) -> None:
    """A checkpoint whose layers all lose the same share, or each another one around it."""
    model = load_model(dense)
    groups = all_groups(model)
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for group in groups:
        spread = 1 + (torch.rand(1, generator=generator).item() - 0.5) * (widths == "different")
        multiple = channels if group.kind == "mlp" else 1
        count = multiple * round(group.units * (1 - ratio * spread) / multiple)
        kept[group.name] = torch.arange(min(group.units, max(multiple, count)))
    no_scores = dict.fromkeys(kept)
    choice = Choice(kept, no_scores, no_scores, threshold=0.0)
    plan = make_plan(groups, choice, str(ratio), source=Source(str(dense), None, "", ""), recipe=Recipe())
    for _ in apply_plan(model, plan, None, recovery="none"):
        pass
    save_pruned(model, dense, target, plan, torch.zeros(1, 1, dtype=torch.long))


def _measure(
    folders: dict[tuple[float, str], Path],
    *,
    device: torch.device,
    prompt_length: int,
    new_tokens: int,
    repeats: int,
    compiled: bool,
) -> Iterator[Row]:
    models = {repr(key): load_model(folder, device=device) for key, folder in folders.items()}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    timings = timed_generations(
        models, prompt_length=prompt_length, new_tokens=new_tokens, repeats=repeats, compiled=compiled
    )
    for name, timing in track(timings, repeats * len(models), "generate"):
        speeds[name].append(1 / timing.seconds_per_token)
    context = prompt_length + new_tokens // 2
    read = {key: count_work(folder, context).bytes_per_token for key, folder in folders.items()}
    dense: Any = next(iter(folders))
    for key in folders:
        yield {
            "removed": key[0],
            "widths": key[1],
            "tokens_per_second": speeds[repr(key)],
            "speed_up": statistics.median(speeds[repr(key)]) / statistics.median(speeds[repr(dense)]),
            "bytes_per_token": read[key],
            "predicted": read[dense] / read[key],
        }


def _line(name: str, row: Row, ceilings: Ceilings) -> str:
    speed = statistics.median(row["tokens_per_second"])
    bandwidth = speed * row["bytes_per_token"]
    cells: Sequence[str] = (
        name,
        f"{row['removed']:.0%}",
        row["widths"],
        f"{speed:.2f}",
        f"{row['speed_up']:.2f} x",
        f"{row['predicted']:.2f} x",
        f"{row['speed_up'] / row['predicted']:.0%}",
        f"{bandwidth / 1e9:.1f}",
        f"{bandwidth / ceilings.memory:.0%}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run_step(generation)
