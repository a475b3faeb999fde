"""The command line."""

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from numprune.architectures import KINDS, check_supported, decoder_blocks, prunable_groups
from numprune.calibration import DEFAULT_SAMPLES, check_data, draw_samples, evaluation_windows
from numprune.checkpoint import (
    check_output,
    fetch,
    load_config,
    load_model,
    load_shapes,
    save_pruned,
    weight_bytes,
    weight_files,
)
from numprune.checkpoint import fingerprint as model_fingerprint
from numprune.device import resolve_device, working_dtype
from numprune.errors import NumpruneError, reported
from numprune.perplexity import perplexity, window_losses
from numprune.plan import PruningPlan, Source, make_plan
from numprune.progress import track
from numprune.pruning import RECIPES, Measured, Recipe, apply_plan, capture_to, score_directions, scores_at
from numprune.samples import fingerprint

app = typer.Typer(
    help="Structural pruning of autoregressive transformers: no training, a folder that loads everywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


class RecipeName(StrEnum):
    """Names of `numprune.pruning.RECIPES`."""

    PAPER = "paper"


class RecoveryName(StrEnum):
    """Names of `numprune.recovery.Recovery`."""

    NONE = "none"
    BIAS = "bias"
    LEAST_SQUARES = "least_squares"
    SEQUENTIAL = "sequential"
    REFIT = "refit"


Model = Annotated[str, typer.Argument(help="Folder of the dense model, or its id on the Hugging Face Hub.")]
Ratio = Annotated[float, typer.Option(help="Share of the attention and MLP parameters to remove, in (0, 1).")]
Calibration = Annotated[
    str,
    typer.Option(
        help="What second moments are measured on: a text file, .jsonl with a `text` field, .safetensors with "
        "`input_ids`, or a Hub data set NAME:SPLIT or NAME:CONFIGURATION:SPLIT."
    ),
]
RecipeOption = Annotated[RecipeName, typer.Option(help="How to score, threshold and compensate.")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration sequences.")]
Length = Annotated[
    int | None, typer.Option(help="Tokens a sequence; by default 2048 or the model's maximum if that is less.")
]
Seed = Annotated[int, typer.Option(help="Of the draw of calibration sequences.")]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Sequences that are computed together; lower it if memory is short.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def prune(
    model: Model,
    ratio: Ratio,
    calibration: Calibration,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not hold anything yet.")],
    recipe: RecipeOption = RecipeName.PAPER,
    recovery: Annotated[
        RecoveryName | None,
        typer.Option(
            help="How the kept weights make up for the pruned ones, if not as in the recipe: none; bias, by the mean "
            "of what is lost; least_squares, each projection by itself; sequential, each also for what went wrong "
            "before it; refit, sequential with the producers refitted. The last two run the calibration sequences "
            "several times more."
        ),
    ] = None,
    samples: Samples = DEFAULT_SAMPLES,
    length: Length = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    revision: Revision = None,
    debug: Debug = False,
) -> None:
    """Prunes a model and writes a smaller checkpoint.

    Example, a fifth of the layers' parameters:

        numprune prune models/reference-llama --ratio 0.2 --calibration text.txt --output out/
    """
    settings = RECIPES[recipe]
    if recovery is not None:
        settings = replace(settings, recovery=recovery.value)
    job = _Job(model, ratio, calibration, settings, samples, length, seed, batch_size, device, revision)
    check_output(output, _needed_bytes(job.folder))
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, because system folders for temporary files are often too small for Gram matrices.
    with tempfile.TemporaryDirectory(prefix=".numprune-", dir=output.parent) as statistics:
        dense, plan, input_ids, _ = _plan(job, Path(statistics))
        measured = Measured(Path(statistics), input_ids, job.batch_size)
        blocks = apply_plan(
            dense,
            plan,
            measured,
            recovery=settings.recovery,
            damping=settings.compensation_damping,
            device=job.place,
        )
        for _ in track(blocks, len(decoder_blocks(dense)), "compensate"):
            pass
    save_pruned(dense, job.folder, output, plan, input_ids)
    before, after = weight_bytes(job.folder), weight_bytes(output)
    typer.echo(f"{plan.achieved_ratio:.2%} of {plan.dense_parameters:,} attention and MLP parameters are gone.")
    typer.echo(f"Weights: {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB in {output}")


@app.command("plan")
def show_plan(
    model: Model,
    ratio: Ratio,
    calibration: Calibration,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the plan to this JSON file.")
    ] = None,
    recipe: RecipeOption = RecipeName.PAPER,
    samples: Samples = DEFAULT_SAMPLES,
    length: Length = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    revision: Revision = None,
    debug: Debug = False,
) -> None:
    """Shows what would go, what that saves and how long pruning takes; writes no weights.

    Example:
        numprune plan models/reference-llama --ratio 0.5 --calibration text.txt
    """
    job = _Job(model, ratio, calibration, RECIPES[recipe], samples, length, seed, batch_size, device, revision)
    with tempfile.TemporaryDirectory(prefix="numprune-") as statistics:
        start = time.monotonic()
        dense, plan, _, scoring = _plan(job, Path(statistics))
        seconds = time.monotonic() - start
    if output is not None:
        plan.save(output)
    console = Console()
    console.print(_plan_table(dense, plan))
    size = weight_bytes(job.folder)
    saved = size * (plan.dense_parameters - plan.kept_parameters) / dense.num_parameters()
    console.print(f"Requested {plan.requested_ratio:.2%}, achieved {plan.achieved_ratio:.2%}.")
    console.print(f"Weights: {size / 2**20:.1f} MiB -> about {(size - saved) / 2**20:.1f} MiB.")
    # Compensation factors the kept part of what scoring factors whole: scoring's time bounds it.
    console.print(f"Time to prune: about {seconds + scoring:.0f} s on this machine ({seconds:.0f} s of it just now).")


@app.command("perplexity")
def measure_perplexity(
    model: Model,
    data: Annotated[str, typer.Option(help="Text in the same forms as --calibration of `numprune prune`.")],
    length: Length = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Stop after so many tokens.")] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Measures perplexity in non-overlapping windows and prints the protocol with it.

    Example:
        numprune perplexity out/ --data Salesforce/wikitext:wikitext-2-raw-v1:test --length 2048
    """
    check_data(data)
    folder = fetch(model, revision)
    check_supported(load_config(folder))
    windows, text_bytes = evaluation_windows(data, str(folder), length=length, max_tokens=max_tokens)
    place = resolve_device(device)
    loaded = load_model(folder, dtype=working_dtype(place), device=place)
    batches = -(-len(windows) // batch_size)
    losses = torch.cat(list(track(window_losses(loaded, windows, batch_size=batch_size), batches, "perplexity")))
    result = perplexity(losses, windows.shape[1], text_bytes)
    protocol = {
        "model": model,
        "data": data,
        "tokens_sha256": fingerprint(windows),
        "stride": windows.shape[1],
        "bos_token": "none added",
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(place),
    }
    if as_json:
        typer.echo(json.dumps({**asdict(result), "protocol": protocol}, indent=2))
        return
    per_byte = f", {result.bits_per_byte:.4f} bits per byte" if result.bits_per_byte else ""
    typer.echo(f"perplexity {result.perplexity:.4f}{per_byte}")
    typer.echo(
        f"{result.windows} non-overlapping windows of {result.length} tokens of {data}, no BOS token added, ", nl=False
    )
    typer.echo(f"{protocol['dtype']} on {place}")


@dataclass
class _Job:
    """The arguments of one pruning; what is wrong with them and cheap to find out is found out here."""

    model: str
    ratio: float
    calibration: str
    recipe: Recipe
    samples: int
    length: int | None
    seed: int
    batch_size: int
    device: str
    revision: str | None
    folder: Path = field(init=False)
    place: torch.device = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise NumpruneError(
                f"--ratio must be in (0, 1), got {self.ratio}: 0.2 removes a fifth of the layers' parameters."
            )
        check_data(self.calibration)
        self.place = resolve_device(self.device)
        self.folder = fetch(self.model, self.revision)
        check_supported(load_config(self.folder))
        weight_files(self.folder)


def _needed_bytes(folder: Path) -> int:
    """An upper bound: statistics of all blocks and weights no smaller than before."""
    blocks = prunable_groups(load_shapes(folder))
    grams = sum(4 * (group.units * group.channels) ** 2 for groups in blocks for group in groups)
    return grams + weight_bytes(folder)


def _plan(job: "_Job", statistics: Path) -> tuple[PreTrainedModel, PruningPlan, Tensor, float]:
    """Captures, scores and plans; returns the dense model, plan, calibration tokens and the seconds scoring took."""
    input_ids = draw_samples(job.calibration, str(job.folder), samples=job.samples, length=job.length, seed=job.seed)
    dense = load_model(job.folder, dtype=working_dtype(job.place))
    groups = [group for block in prunable_groups(dense) for group in block]
    captured = capture_to(statistics, dense, input_ids, batch_size=job.batch_size, device=job.place)
    for _ in track(captured, len(decoder_blocks(dense)), "capture"):
        pass
    start = time.monotonic()
    directions = dict(track(score_directions(dense, statistics, job.recipe, job.place), len(groups), "score"))
    scoring = time.monotonic() - start
    source = Source(job.model, job.revision, model_fingerprint(job.folder), fingerprint(input_ids))
    scores = scores_at(directions, job.ratio)
    plan = make_plan(
        groups, scores, job.ratio, source=source, recipe=asdict(job.recipe), threshold=job.recipe.threshold
    )
    return dense, plan, input_ids, scoring


def _plan_table(model: PreTrainedModel, plan: PruningPlan) -> Table:
    table = Table("block", *(f"{kind} units kept" for kind in KINDS), "parameters kept")
    for index, groups in enumerate(prunable_groups(model)):
        planned = {group.kind: plan.groups[group.name] for group in groups}
        kept = sum(len(group.kept) * group.unit_parameters for group in planned.values())
        total = sum(group.units * group.unit_parameters for group in planned.values())
        counts = (f"{len(planned[kind].kept)} of {planned[kind].units}" if kind in planned else "" for kind in KINDS)
        table.add_row(str(index), *counts, f"{kept / total:.1%}" if total else "")
    return table


def main() -> None:
    """Runs the command line; an error that the user can mend is one message and exit code 2."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with reported(debug="--debug" in sys.argv):
        try:
            app()
        except torch.cuda.OutOfMemoryError as error:
            raise NumpruneError(
                "The GPU is out of memory: lower --batch-size or --length, or use --device cpu."
            ) from error
