"""What the arithmetic changes: the model in other precisions and other batch sizes, against float64.

python -m benchmarks.precision --help
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.measuring import (
    Bench,
    Calibration,
    Device,
    Evaluation,
    MaxTokens,
    Model,
    Output,
    Row,
    SampleCount,
    collect,
)
from numprune.calibration import check_data
from numprune.progress import track
from numprune.recipe import RECIPES
from tasks.step import run_step

RATIOS = (0.2, 0.5)
# The first is what the others are compared with.
ARITHMETIC = (("float64", 8), ("float32", 8), ("float32", 1), ("float32", 32), ("bfloat16", 8))


def precision(
    *,
    model: Model = Path("models/reference-llama"),
    calibration: Calibration = "data/corpus/calibration.jsonl",
    evaluation: Evaluation = "data/corpus/evaluation.jsonl",
    samples: SampleCount = 128,
    seed: Annotated[int, typer.Option(help="Of their draw.")] = 0,
    max_tokens: MaxTokens = 65536,
    device: Device = "auto",
    output: Output = Path("report/precision"),
) -> None:
    """Prunes by every preset at 20 % and 50 % in several precisions and batch sizes: moments, choices, perplexities."""
    for text in (calibration, evaluation):
        check_data(text)
    output.mkdir(parents=True, exist_ok=True)
    protocol: Row = {"model": str(model), "calibration": calibration, "samples": samples, "seed": seed}
    protocol |= {"evaluation": evaluation, "max_tokens": max_tokens}
    rows: list[Row] = []
    exact: dict[str, Tensor] = {}
    errors = []
    for dtype, batch_size in track(ARITHMETIC, len(ARITHMETIC), "precision"):
        bench = Bench(model, evaluation, max_tokens, batch_size, device, getattr(torch, dtype))
        case = protocol | {"dtype": dtype, "batch_size": batch_size}
        cases = [case | {"recipe": recipe, "ratio": ratio} for recipe in RECIPES for ratio in RATIOS]
        with bench.calibrated(calibration, samples, seed):
            grams = bench.grams()
            exact = exact or grams
            errors.append(max(float((grams[name] - gram).norm() / gram.norm()) for name, gram in exact.items()))
            rows += collect(output / "rows.jsonl", cases, partial(_measure, bench))
    table = _table(rows, errors)
    (output / "precision.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def _measure(bench: Bench, row: Row) -> Row:
    recipe, ratio = RECIPES[row["recipe"]], row["ratio"]
    kept = {name: units.tolist() for name, units in bench.choose(recipe, ratio).kept.items()}
    return {"kept": kept} | bench.measure(recipe, ratio)


def _table(rows: list[Row], errors: list[float]) -> str:
    columns = [(recipe, ratio) for recipe in RECIPES for ratio in RATIOS]
    lines = [
        f"| model in | batch | X^T X | {' | '.join(f'{recipe}, {ratio:.0%}' for recipe, ratio in columns)} |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for (dtype, batch_size), error in zip(ARITHMETIC, errors, strict=True):
        cells = []
        for recipe, ratio in columns:
            of_column = [row for row in rows if (row["recipe"], row["ratio"]) == (recipe, ratio)]
            row = next(row for row in of_column if (row["dtype"], row["batch_size"]) == (dtype, batch_size))
            cells.append(f"{row['perplexity']:.3f} ({_differing(row['kept'], of_column[0]['kept'])})")
        lines.append(f"| {dtype} | {batch_size} | {error:.0e} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _differing(kept: dict[str, list[int]], reference: dict[str, list[int]]) -> int:
    """Units that stay in one and go in the other."""
    return sum(len(set(kept[name]) ^ set(reference[name])) for name in reference)


if __name__ == "__main__":
    run_step(precision)
