"""The command line."""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import wraps
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from numprune.architectures import KINDS, all_groups, check_supported, decoder_blocks, prunable_groups
from numprune.batches import fitting_batch
from numprune.budget import linear_costs, readable
from numprune.calibration import check_data, draw_samples, evaluation_windows
from numprune.card import write_card
from numprune.checkpoint import (
    block_bytes,
    check_output,
    check_space,
    fetch,
    load_config,
    load_model,
    load_or_open,
    load_shapes,
    open_model,
    weight_bytes,
)
from numprune.checkpoint import fingerprint as model_fingerprint
from numprune.convert_commands import app as convert_app
from numprune.cutting import twin
from numprune.device import resolve_device, working_dtype
from numprune.errors import NumpruneError, reported
from numprune.files import held_bytes
from numprune.memory import use_huge_pages
from numprune.miniature import miniature
from numprune.multimodal import language_config
from numprune.options import BatchSize, Device, Job, Length, Model, Revision, takes_job
from numprune.parity import check_parity, stock_shapes
from numprune.perplexity import perplexity, scored_tokens, window_losses
from numprune.plan import PruningPlan, Source, make_plan, to_ranges
from numprune.planning import choose_within, with_biases
from numprune.progress import track
from numprune.pruning import apply_plan, capture_to
from numprune.push import push
from numprune.ranks import agreed, is_first, joined, meet, ranks
from numprune.resume import unfinished
from numprune.samples import fingerprint
from numprune.saving import save_pruned
from numprune.statistics import Measured
from numprune.stock import family
from numprune.texts import bos_token

app = typer.Typer(
    help="Structural pruning of autoregressive transformers: no training, a folder that loads everywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

app.add_typer(convert_app, name="convert")

PLUGINS = "numprune.commands"

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
@takes_job
def prune(
    job: Job,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not hold anything yet.")],
    debug: Debug = False,
) -> None:
    """Prunes a model and writes a smaller checkpoint.

    Examples, a fifth of the layers' parameters, and a checkpoint of 8 GB:

        numprune prune models/reference-llama --ratio 0.2 --calibration text.txt --output out/

        numprune prune meta-llama/Llama-3.1-8B --size 8GB --calibration text.txt --output out/
    """
    if job.budget.kind == "latency" and ranks() > 1:
        raise NumpruneError("A latency is measured in one process: start without torchrun, or choose another budget.")
    check_output(output)
    with unfinished(output, **_depends_on(job)) as work:
        check_space(output, _needed_bytes(job) - held_bytes(work))
        dense, plan, measured = _plan(job, work)
        recipe, blocks = job.settings, len(decoder_blocks(dense))
        applied = apply_plan(dense, plan, measured, recovery=recipe.recovery, damping=recipe.damping, work=work)
        for _ in track(applied, blocks, "compensate"):
            pass
        form = save_pruned(dense, job.folder, output, plan, measured.samples)
    if not is_first():
        return
    write_card(output, form)
    before, after = weight_bytes(job.folder), weight_bytes(output)
    typer.echo(f"{plan.achieved_ratio:.2%} of {plan.dense_parameters:,} attention and MLP parameters are gone.")
    typer.echo(f"Weights: {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB in {output}")
    typer.echo(f"Loads as {form}")


@app.command("plan")
@takes_job
def show_plan(
    job: Job,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the plan to this JSON file.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Shows what would go, what that saves and how long pruning takes; writes no weights.

    Example:
        numprune plan models/reference-llama --ratio 0.5 --calibration text.txt
    """
    if ranks() > 1:
        raise NumpruneError("`numprune plan` runs in one process: start it without torchrun.")
    if output is not None and output.is_dir():
        raise NumpruneError(f"--output {output} is a folder: name a file.")
    check_space(Path(tempfile.gettempdir()), _statistics_bytes(job.folder))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="numprune-") as work:
        dense, plan, measured = _plan(job, Path(work))
        seconds = time.monotonic() - start
        # What recovery takes follows from the time of its first block.
        blocks = apply_plan(twin(dense), plan, measured, recovery=job.settings.recovery, damping=job.settings.damping)
        next(blocks)
        total = seconds + (time.monotonic() - start - seconds) * len(decoder_blocks(dense))
    if output is not None:
        plan.save(output)
    console = Console()
    console.print(_plan_table(dense, plan))
    console.print(f"Budget {plan.budget}: {plan.achieved_ratio:.2%} of the attention and MLP parameters go.")
    stored = load_shapes(job.folder)
    pruned = with_biases(stored) if job.settings.recovery == "bias" else stored
    kept = {name: len(group.kept) for name, group in plan.groups.items()}
    units = {name: group.units for name, group in plan.groups.items()}
    for kind in ("parameters", "size", "memory", "flops"):
        counted = replace(job.budget, kind=kind, value=1)
        before = readable(linear_costs(stored, counted).total(units), kind)
        after = readable(linear_costs(pruned, counted).total(kept), kind)
        console.print(f"  {kind}: {before} -> {after}", highlight=False)
    console.print(f"Time to prune: about {total:.0f} s on this machine ({seconds:.0f} s of it just now).")


@app.command("perplexity")
def measure_perplexity(
    model: Model,
    data: Annotated[
        str, typer.Option(help="wikitext2, ptb or c4, or text in the same forms as --calibration of `numprune prune`.")
    ],
    length: Length = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Stop after so many tokens.")] = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Measures perplexity in non-overlapping windows and prints the protocol with it.

    Example:
        numprune perplexity out/ --data wikitext2 --length 2048
    """
    check_data(data, named=True)
    folder = fetch(model, revision)
    check_supported(language_config(load_config(folder)))
    windows, text_bytes = evaluation_windows(data, str(folder), length=length, max_tokens=max_tokens)
    place = resolve_device(device)
    loaded = load_or_open(folder, dtype=working_dtype(place), device=place)
    batch_size = batch_size or fitting_batch(loaded, windows.length, place)
    batches = -(-len(windows) // batch_size)
    losses = torch.cat(
        list(track(window_losses(loaded, windows, batch_size=batch_size, device=place), batches, "perplexity"))
    )
    result = perplexity(losses, windows.length, text_bytes, scored=scored_tokens(loaded, windows))
    protocol = {
        "model": model,
        "data": data,
        "tokens_sha256": fingerprint(windows),
        "stride": windows.length,
        "bos_token": bos_token(data),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(place),
    }
    if as_json:
        typer.echo(json.dumps({**asdict(result), "protocol": protocol}, indent=2))
        return
    per_byte = f", {result.bits_per_byte:.4f} bits per byte" if result.bits_per_byte else ""
    typer.echo(f"perplexity {result.perplexity:.4f}{per_byte}")
    typer.echo(
        f"{result.windows} non-overlapping windows of {result.length} tokens of {data}, "
        f"BOS token {protocol['bos_token']}, ",
        nl=False,
    )
    typer.echo(f"{protocol['dtype']} on {place}")


@app.command()
def check(
    model: Model,
    random: Annotated[
        bool,
        typer.Option("--random", help="Read config.json alone and try a small random model with the same features."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the units that stay, and of random weights.")] = 0,
    device: Device = "auto",
    revision: Revision = None,
    debug: Debug = False,
) -> None:
    """Tries whether a model can be pruned: what is cut out must give the logits of the model with it at zero.

    Everything computes in double precision; without `--random` that takes up to four times the model's size in float64.
    The exit code is 1 if something does not hold.

    Example:
        numprune check Qwen/Qwen3-8B --random
    """
    place = resolve_device(device)
    if random:
        config = language_config(load_config(model, revision))
        check_supported(config)
        if config.model_type.startswith("ragged_"):
            raise NumpruneError(f"{model} is pruned, with layers of different widths: try it without --random.")
        subject = miniature(config, seed).to(place)  # type: ignore[arg-type]  # torch's device is one of what it takes.
    else:
        subject = load_model(fetch(model, revision), dtype=torch.float64, device=place)
    typer.echo(f"{model}: family {family(subject.config)}, {len(decoder_blocks(subject))} blocks")
    findings = []
    for finding in check_parity(subject, seed=seed):
        findings.append(finding)
        typer.echo(f"  {'holds' if finding.holds else 'FAILS'}  {finding.claim} ({finding.detail})")
    if not all(finding.holds for finding in findings):
        typer.echo("error: the layout of the family is not right, see docs/architectures.md.", err=True)
        raise typer.Exit(1)
    Console().print(_groups_table(subject))
    for cut, form in stock_shapes(subject).items():
        typer.echo(f"  {cut}, the same in all layers -> {form}")
    typer.echo("  widths that differ by layer -> ragged")


def _groups_table(model: PreTrainedModel) -> Table:
    table = Table("blocks", "producers", "consumer", "units", "channels a unit", "parameters a unit")
    for column in table.columns:
        column.overflow = "fold"
    alike: dict[tuple[str, ...], list[int]] = {}
    for group in all_groups(model):
        producers = ", ".join(producer.path for producer in group.producers)
        sizes = (group.units, group.channels, group.unit_parameters)
        alike.setdefault((producers, group.consumer, *map(str, sizes)), []).append(group.block)
    for description, blocks in alike.items():
        table.add_row(to_ranges(blocks), *description)
    return table


@app.command("push")
def push_to_hub(
    folder: Annotated[Path, typer.Argument(help="Folder that `numprune prune` wrote.", metavar="DIR")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub.", metavar="REPO_ID")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may read it; private otherwise.")] = False,
    debug: Debug = False,
) -> None:
    """Uploads a pruned checkpoint to the Hugging Face Hub, privately unless told otherwise.

    The token is that of `hf auth login` or of the variable HF_TOKEN.

    Example:
        numprune push out/ my-team/my-model-pruned
    """
    typer.echo(push(folder, repository, public=public))


export = typer.Typer(help="Writes a checkpoint in the format of another engine.", no_args_is_help=True)
app.add_typer(export, name="export")


@export.command("gguf")
def export_to_gguf(
    folder: Annotated[Path, typer.Argument(help="Folder of the checkpoint, pruned or dense.", metavar="DIR")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; it must not exist yet.")],
    kind: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"], typer.Option("--type", help="Of the matrices; q8_0: 8 bits a weight.")
    ] = "f16",
    debug: Debug = False,
) -> None:
    """Writes a GGUF file for llama.cpp, tokenizer included.

    Example:
        numprune export gguf out/ -o out.gguf --type q8_0
    """
    try:
        from numprune.export.llama_cpp import export_gguf
    except ModuleNotFoundError as error:
        raise NumpruneError(
            f"This needs {error.name}, which is not installed: run `pip install 'numprune[gguf]'`."
        ) from error
    if output.exists():
        raise NumpruneError(f"{output} exists already: choose another --output or remove it.")
    exported = export_gguf(fetch(str(folder)), output, kind=kind)
    filled = f"; {exported.filled}" if exported.filled else ""
    typer.echo(f"{output}: {output.stat().st_size / 2**20:.1f} MiB, architecture {exported.architecture}{filled}")


def _needed_bytes(job: Job) -> int:
    """What is known before: the result no larger than the model, and what is in the work folder at its end.

    That has statistics and blocks of the dense model, and of the models between two cuts.
    """
    of_model = _statistics_bytes(job.folder) + block_bytes(job.folder, working_dtype(job.place))
    return weight_bytes(job.folder) + job.settings.steps * of_model


def _statistics_bytes(folder: Path) -> int:
    return sum(4 * (group.units * group.channels) ** 2 for group in all_groups(load_shapes(folder)))


def _depends_on(job: Job) -> dict[str, Any]:
    """What decides the result of `numprune prune`; paths stand for their files."""
    text = Path(job.calibration)
    options = {field.name: getattr(job, field.name) for field in fields(job)}
    return options | {"calibration": text if text.is_file() else job.calibration}


def _plan(job: Job, work: Path) -> tuple[PreTrainedModel, PruningPlan, Measured]:
    """Captures, ranks and plans; returns the dense model, the plan and what it draws on."""
    samples = draw_samples(job.calibration, str(job.folder), samples=job.samples, length=job.length, seed=job.seed)
    dense = open_model(job.folder, dtype=working_dtype(job.place))
    groups = all_groups(dense)
    measured = Measured(work / "statistics", samples, job.batch_size, job.place, work)
    captured = capture_to(measured.statistics, dense, samples, batch_size=job.batch_size, device=job.place, work=work)
    for _ in track(captured, len(decoder_blocks(dense)), "capture"):
        pass
    # A plan is made once: what a measured latency asks for changes from one time to the next.
    path = work / "plan.json"
    if agreed(path.exists()):
        return dense, PruningPlan.load(path), measured
    timed = job.budget.kind == "latency"
    stored = load_model(job.folder, device=job.place) if timed else load_shapes(job.folder)
    choice = choose_within(job.budget, dense, stored, job.settings, measured, watch=track)
    source = Source(job.model, job.commit, model_fingerprint(job.folder), fingerprint(samples))
    plan = make_plan(groups, choice, str(job.budget), source=source, recipe=job.settings)
    if is_first():
        plan.save(path)
    meet()
    return dense, plan, measured


def _plan_table(model: PreTrainedModel, plan: PruningPlan) -> Table:
    table = Table("block", *(f"{kind} units kept" for kind in KINDS), "parameters kept")
    for index, groups in enumerate(prunable_groups(model)):
        planned = {group.kind: plan.groups[group.name] for group in groups}
        kept = sum(len(group.kept) * group.unit_parameters for group in planned.values())
        total = sum(group.units * group.unit_parameters for group in planned.values())
        counts = (f"{len(planned[kind].kept)} of {planned[kind].units}" if kind in planned else "" for kind in KINDS)
        table.add_row(str(index), *counts, f"{kept / total:.1%}" if total else "")
    return table


def add_plugins(target: typer.Typer) -> None:
    """Adds the commands that installed packages offer under the entry point `numprune.commands`, each a typer app."""
    for entry in sorted(entry_points(group=PLUGINS)):
        try:
            commands = entry.load().registered_commands
        except Exception as error:  # A broken plug-in must not take `numprune prune` along.
            print(f"warning: the commands of {entry.value} are left out: {error}", file=sys.stderr)
            continue
        for command in commands:
            command.callback = _with_extra(command.callback)
            target.registered_commands.append(command)


def _with_extra(command: Callable[..., Any]) -> Callable[..., Any]:
    """Says which extra to install where a command's own imports fail."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except ModuleNotFoundError as error:
            raise NumpruneError(
                f"This command needs {error.name}, which is not installed: run `pip install 'numprune[pipeline]'`."
            ) from error

    return run


def main() -> None:
    """Runs the command line; an error that the user can mend is one message and exit code 2."""
    use_huge_pages()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with reported(debug="--debug" in sys.argv):
        try:
            add_plugins(app)
            with joined():
                app()
        except torch.cuda.OutOfMemoryError as error:
            raise NumpruneError(
                "The GPU is out of memory: lower --batch-size or --length, or use --device cpu."
            ) from error
