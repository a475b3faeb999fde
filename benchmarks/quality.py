"""Perplexity after every recipe at every ratio: which choice brings what, on equal terms.

python -m benchmarks.quality --help
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from benchmarks.measuring import (
    BatchSize,
    Bench,
    Calibration,
    Device,
    Evaluation,
    MaxTokens,
    Model,
    Output,
    Row,
    SampleCount,
    Seeds,
    collect,
)
from numprune.allocation import Shapes
from numprune.calibration import check_data
from numprune.errors import NumpruneError
from numprune.progress import track
from numprune.recipe import RECIPES, Recipe
from tasks.step import run_step

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PAPER, BEST = RECIPES["paper"], RECIPES["best"]
VARIANTS: dict[str, Recipe] = {
    "paper": PAPER,
    "paper, no compensation": replace(PAPER, recovery="none"),
    "paper, Eq. 8 literally": replace(PAPER, allocation="literal"),
    "paper, uniform": replace(PAPER, allocation="uniform"),
    "paper, box kept": replace(PAPER, selection="box"),
    "paper, sequential": replace(PAPER, recovery="sequential"),
    "paper, refit": replace(PAPER, recovery="refit"),
    "paper, loss-aware": replace(PAPER, allocation="loss_aware"),
    "greedy, global": replace(BEST, allocation="global", recovery="least_squares"),
    "greedy, loss-aware": replace(BEST, recovery="least_squares"),
    "greedy, loss-aware, sequential": replace(BEST, recovery="sequential"),
    "best": BEST,
    "best, damping 1e-6": replace(BEST, damping=1e-6),
    "best, 3 steps": replace(BEST, steps=3),
    "best, channels on 64": replace(BEST, shapes=Shapes(channels=64)),
    "best, uniform shapes": replace(BEST, shapes=Shapes(uniform=True)),
    "best, depth": replace(BEST, shapes=Shapes(depth=True)),
    "random": replace(PAPER, selection="random", recovery="none"),
    "random + compensation": replace(PAPER, selection="random"),
    "magnitude": replace(PAPER, selection="magnitude", recovery="none"),
    "magnitude + compensation": replace(PAPER, selection="magnitude"),
    "Wanda-sp": replace(PAPER, selection="wanda_sp", recovery="none"),
    "Wanda-sp + compensation": replace(PAPER, selection="wanda_sp"),
    "FLAP": replace(PAPER, selection="flap", recovery="bias"),
    "FLAP + compensation": replace(PAPER, selection="flap"),
}
# The curves of the plot, at every ratio and with every seed; the others are measured where the table shows them.
CURVES = ("paper", "best", "FLAP", "Wanda-sp + compensation")
TABLE_RATIOS = (0.2, 0.5)
# Recipes whose shapes or allocation miss the ratio by more than this are not on equal terms, and the table says so.
_NOTEWORTHY = 0.002


def compare(
    *,
    model: Model = Path("models/reference-llama"),
    calibration: Calibration = "data/corpus/calibration.jsonl",
    evaluation: Evaluation = "data/corpus/evaluation.jsonl",
    ratios: Annotated[str, typer.Option(help="Of the curves.")] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7",
    seeds: Seeds = "0,1,2",
    recipes: Annotated[str, typer.Option(help="Names to compare, separated by ;, or all.")] = "all",
    samples: SampleCount = 128,
    max_tokens: MaxTokens = 65536,
    batch_size: BatchSize = None,
    device: Device = "auto",
    output: Output = Path("report/quality"),
) -> None:
    """Compares recipes: perplexity at several ratios, mean and spread over the calibration seeds.

    The recipes of the curves are measured at all ratios with all seeds, the others at 20 % and 50 % with the first.
    """
    names = list(VARIANTS) if recipes == "all" else [name.strip() for name in recipes.split(";")]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise NumpruneError(f"--recipes names {unknown}; known are: {'; '.join(VARIANTS)}.")
    check_data(calibration)
    check_data(evaluation)
    points, draws = [float(r) for r in ratios.split(",")], [int(s) for s in seeds.split(",")]
    output.mkdir(parents=True, exist_ok=True)
    bench = Bench(model, evaluation, max_tokens, batch_size, device)
    protocol = bench.protocol | {"calibration": calibration, "samples": samples}
    rows = []
    for seed in draws:
        cases: list[Row] = []
        for name in names:
            measured_at = points if name in CURVES else [r for r in points if r in TABLE_RATIOS and seed == draws[0]]
            cases += [protocol | {"recipe": name, "seed": seed, "ratio": ratio} for ratio in measured_at]
        with bench.calibrated(calibration, samples, seed):
            found = collect(
                output / "rows.jsonl", cases, lambda case: bench.measure(VARIANTS[case["recipe"]], case["ratio"])
            )
            rows += list(track(found, len(cases), f"quality, seed {seed}"))
    dense = bench.dense_perplexity()
    stated = (
        f"{model.name}: {len(bench.windows)} windows of {bench.windows.length} tokens of {evaluation}; {samples} "
        f"sequences of {calibration}, seeds {seeds}; {bench.place}."
    )
    table = _table(rows, dense)
    (output / "quality.md").write_text(f"{table}\n\n{stated}\n", encoding="utf-8")
    _plot(rows, dense, output / "quality.png")
    print(table, stated, sep="\n\n")


def _table(rows: list[Row], dense: float) -> str:
    """Perplexity, and its excess over dense as a share of that of the paper's recipe with the same seeds."""
    ratios = [ratio for ratio in TABLE_RATIOS if any(row["ratio"] == ratio for row in rows)]
    shares = " | ".join(f"{ratio:.0%} | damage" for ratio in ratios)
    lines = [f"| recipe | {shares} |", "|---" * (1 + 2 * len(ratios)) + "|"]
    lines.append(f"| dense | {' | '.join([f'{dense:.2f} | '] * len(ratios))} |")
    for name in dict.fromkeys(row["recipe"] for row in rows):
        cells = []
        for ratio in ratios:
            by_seed, paper_by_seed = _at(rows, name, ratio), _at(rows, "paper", ratio)
            if not by_seed:
                cells += ["not possible", ""]
                continue
            mine = list(by_seed.values())
            paper = [paper_by_seed[seed] for seed in by_seed if seed in paper_by_seed]
            damage = (statistics.mean(mine) - dense) / (statistics.mean(paper) - dense) if paper else None
            value = f"{statistics.mean(mine):.2f}" + (f" ± {statistics.stdev(mine):.2f}" if len(mine) > 1 else "")
            case = {"recipe": name, "ratio": ratio}
            removed = statistics.mean(
                row["removed"] for row in rows if case.items() <= row.items() and "removed" in row
            )
            if abs(removed - ratio) > _NOTEWORTHY:
                value += f" ({removed:.1%} removed)"
            cells += [value, "" if damage is None else f"{damage:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _at(rows: list[Row], recipe: str, ratio: float) -> dict[int, float]:
    """Perplexities by calibration seed; empty where the recipe cannot reach the ratio."""
    mine = (row for row in rows if (row["recipe"], row["ratio"]) == (recipe, ratio) and "impossible" not in row)
    return {row["seed"]: row["perplexity"] for row in mine}


def _plot(rows: list[Row], dense: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in (name for name in CURVES if any(row["recipe"] == name for row in rows)):
        ratios = sorted({row["ratio"] for row in rows if _at(rows, name, row["ratio"])})
        values = [list(_at(rows, name, ratio).values()) for ratio in ratios]
        (line,) = axes.plot([100 * r for r in ratios], [statistics.mean(v) for v in values], marker="o", label=name)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between([100 * r for r in ratios], low, high, color=line.get_color(), alpha=0.2)
    axes.axhline(dense, color="gray", linestyle="--", label="dense")
    axes.set(xlabel="attention and MLP parameters removed (%)", ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_step(compare)
