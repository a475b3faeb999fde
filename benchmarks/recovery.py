"""Perplexity after every kind of recovery from the same cut.

python -m benchmarks.recovery models/reference-llama data/corpus/calibration.jsonl data/corpus/evaluation.jsonl
"""

import tempfile
import time
from pathlib import Path
from typing import get_args

import torch

from numprune.architectures import prunable_groups
from numprune.calibration import draw_samples, evaluation_windows
from numprune.checkpoint import fingerprint, load_model
from numprune.device import resolve_device, working_dtype
from numprune.perplexity import perplexity, window_losses
from numprune.plan import Source, make_plan
from numprune.progress import track
from numprune.pruning import Measured, Recipe, apply_plan, capture_to, score_directions, scores_at
from numprune.recovery import Recovery
from numprune.samples import fingerprint as samples_fingerprint
from tasks.step import run_step

RATIOS = (0.2, 0.5)


def compare(
    model: Path,
    calibration: str,
    evaluation: str,
    *,
    samples: int = 128,
    max_tokens: int = 131072,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Cuts a model by the paper's scores and prints, as a table, its perplexity after each recovery."""
    place = resolve_device(device)
    recipe = Recipe()
    input_ids = draw_samples(calibration, str(model), samples=samples, seed=seed)
    windows, _ = evaluation_windows(evaluation, str(model), max_tokens=max_tokens)

    dense = load_model(model, dtype=working_dtype(place))
    groups = [group for block in prunable_groups(dense) for group in block]
    source = Source(str(model), None, fingerprint(model), samples_fingerprint(input_ids))
    table = ["| recovery | removed | perplexity | seconds |", "|---|---|---|---|"]

    with tempfile.TemporaryDirectory() as folder:
        measured = Measured(Path(folder), input_ids, batch_size)
        list(capture_to(measured.statistics, dense, input_ids, batch_size=batch_size, device=place))
        directions = dict(score_directions(dense, measured.statistics, recipe, place))
        losses = torch.cat(list(window_losses(dense, windows, batch_size=batch_size, device=place)))
        table.append(f"| dense | | {perplexity(losses, windows.shape[1]).perplexity:.2f} | |")
        cases = [(ratio, recovery) for ratio in RATIOS for recovery in get_args(Recovery)]
        for ratio, recovery in track(cases, len(cases), "recovery"):
            plan = make_plan(groups, scores_at(directions, ratio), ratio, source=source, recipe={})
            pruned = load_model(model, dtype=working_dtype(place))
            start = time.monotonic()
            damping = recipe.compensation_damping
            list(apply_plan(pruned, plan, measured, recovery=recovery, damping=damping, device=place))
            seconds = time.monotonic() - start
            losses = torch.cat(list(window_losses(pruned, windows, batch_size=batch_size, device=place)))
            value = perplexity(losses, windows.shape[1]).perplexity
            table.append(f"| {recovery} | {plan.achieved_ratio:.1%} | {value:.2f} | {seconds:.1f} |")
    print("\n".join(table))
    print(
        f"\n{len(windows)} windows of {windows.shape[1]} tokens of {evaluation}; {samples} sequences of {calibration}, "
        f"seed {seed}; {place}, {torch.get_num_threads()} threads."
    )


if __name__ == "__main__":
    run_step(compare)
