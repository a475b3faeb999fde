"""How many tokens the rises of the loss need: perplexity and time with fewer and more of them.

python -m benchmarks.planning --help
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

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
from benchmarks.quality import VARIANTS
from numprune.calibration import check_data
from numprune.errors import NumpruneError
from numprune.progress import track
from tasks.step import run_step

RATIOS = (0.2, 0.5)


def vary(
    *,
    model: Model = Path("models/reference-llama"),
    calibration: Calibration = "data/corpus/calibration.jsonl",
    evaluation: Evaluation = "data/corpus/evaluation.jsonl",
    tokens: Annotated[str, typer.Option(help="That the rises are measured on.")] = "512,1024,2048,4096,16384",
    seeds: Seeds = "0,1,2",
    recipe: Annotated[str, typer.Option(help="Name from benchmarks/quality.py, of a loss-aware one.")] = "best",
    samples: SampleCount = 128,
    max_tokens: MaxTokens = 65536,
    batch_size: BatchSize = None,
    device: Device = "auto",
    output: Output = Path("report/planning"),
) -> None:
    """Measures a recipe at 20 % and 50 % for each number of planning tokens: mean and spread over the seeds."""
    if recipe not in VARIANTS or VARIANTS[recipe].allocation != "loss_aware":
        known = "; ".join(name for name, variant in VARIANTS.items() if variant.allocation == "loss_aware")
        raise NumpruneError(f"--recipe must be loss-aware, got {recipe!r}; known are: {known}.")
    for text in (calibration, evaluation):
        check_data(text)
    output.mkdir(parents=True, exist_ok=True)
    bench = Bench(model, evaluation, max_tokens, batch_size, device)
    protocol = bench.protocol | {"calibration": calibration, "samples": samples, "recipe": recipe}
    counts = [int(count) for count in tokens.split(",")]
    rows: list[Row] = []
    for seed in (int(seed) for seed in seeds.split(",")):
        cases: list[Row] = [
            protocol | {"seed": seed, "planning_tokens": count, "ratio": ratio} for count in counts for ratio in RATIOS
        ]

        def row(case: Row) -> Row:
            planned = replace(VARIANTS[recipe], planning_tokens=case["planning_tokens"])
            ordering = _seconds(lambda: bench.rank(replace(planned, allocation="global")))
            ranking = _seconds(lambda: bench.rank(planned))
            return {"seconds_of_rises": ranking - ordering, **bench.measure(planned, case["ratio"])}

        with bench.calibrated(calibration, samples, seed):
            rows += list(track(collect(output / "rows.jsonl", cases, row), len(cases), f"planning, seed {seed}"))
    table = _table(rows)
    (output / "planning.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def _seconds(run: Callable[[], object]) -> float:
    """Of the process on all cores, which other processes of the machine change little."""
    start = time.process_time()
    run()
    return time.process_time() - start


def _table(rows: list[Row]) -> str:
    lines = [f"| planning tokens | {' | '.join(f'{ratio:.0%}' for ratio in RATIOS)} | CPU seconds of the rises |"]
    lines.append("|---:" * (2 + len(RATIOS)) + "|")
    for count in dict.fromkeys(row["planning_tokens"] for row in rows):
        mine = [row for row in rows if row["planning_tokens"] == count]
        cells = []
        for ratio in RATIOS:
            values = [row["perplexity"] for row in mine if row["ratio"] == ratio and "impossible" not in row]
            spread = f" ± {statistics.stdev(values):.2f}" if values[1:] else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "not possible")
        # The second ratio takes the first one's rankings.
        seconds = statistics.mean(row["seconds_of_rises"] for row in mine if row["ratio"] == RATIOS[0])
        lines.append(f"| {count} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_step(vary)
