"""How much the outcome depends on the calibration: its size, its text, and the draw.

python -m benchmarks.robustness --help
"""

import statistics
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.measuring import BatchSize, Bench, Device, Evaluation, MaxTokens, Model, Output, Row, Seeds, collect
from numprune.calibration import check_data
from numprune.progress import track
from numprune.recipe import RECIPES
from tasks.step import run_step

RATIOS = (0.2, 0.5)


def spread(
    *,
    model: Model = Path("models/reference-llama"),
    calibration: Annotated[list[str] | None, typer.Option(help="Texts to calibrate on; repeat it for several.")] = None,
    evaluation: Evaluation = "data/corpus/evaluation.jsonl",
    samples: Annotated[str, typer.Option(help="Numbers of calibration sequences.")] = "16,64,256,1024",
    seeds: Seeds = "0,1,2",
    max_tokens: MaxTokens = 65536,
    batch_size: BatchSize = None,
    device: Device = "auto",
    output: Output = Path("report/robustness"),
) -> None:
    """Measures every preset at 20 % and 50 % for each size, text and draw of the calibration: mean and spread."""
    texts = calibration or ["data/corpus/calibration.jsonl"]
    for text in (*texts, evaluation):
        check_data(text)
    output.mkdir(parents=True, exist_ok=True)
    bench = Bench(model, evaluation, max_tokens, batch_size, device)
    protocol = bench.protocol
    draws: list[Row] = [
        protocol | {"calibration": text, "samples": int(count), "seed": int(seed)}
        for text in texts
        for count in samples.split(",")
        for seed in seeds.split(",")
    ]
    rows: list[Row] = []
    for draw in track(draws, len(draws), "robustness"):
        cases = [draw | {"recipe": recipe, "ratio": ratio} for recipe in RECIPES for ratio in RATIOS]
        with bench.calibrated(draw["calibration"], draw["samples"], draw["seed"]):
            measured = collect(
                output / "rows.jsonl", cases, lambda row: bench.measure(RECIPES[row["recipe"]], row["ratio"])
            )
            rows += list(measured)
    table = _table(rows)
    (output / "robustness.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def _table(rows: list[Row]) -> str:
    columns = [(recipe, ratio) for recipe in RECIPES for ratio in RATIOS]
    lines = [
        f"| calibration | sequences | draws | {' | '.join(f'{recipe}, {ratio:.0%}' for recipe, ratio in columns)} |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for text, count in dict.fromkeys((row["calibration"], row["samples"]) for row in rows):
        cells = []
        draws = {row["seed"] for row in rows if (row["calibration"], row["samples"]) == (text, count)}
        for recipe, ratio in columns:
            case = {"calibration": text, "samples": count, "recipe": recipe, "ratio": ratio}
            values = [row["perplexity"] for row in rows if case.items() <= row.items() and "impossible" not in row]
            if not values:
                cells.append("not possible")
                continue
            cells.append(
                f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if values[1:] else "")
            )
        lines.append(f"| {Path(text).name} | {count} | {len(draws)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_step(spread)
