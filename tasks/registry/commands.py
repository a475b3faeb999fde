"""Commands of the registry: `numprune versions`, `promote`, `rollback` and `pull`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from numprune.errors import NumpruneError

# Everything else is imported where it is used: `numprune prune` must not wait for MLflow, nor need it.
if TYPE_CHECKING:
    from tasks.registry.promote import Decision

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RegistryAddress = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="URI",
        help="Address of MLflow; by default that of params.yaml, else of the variable MLFLOW_TRACKING_URI.",
    ),
]
By = Annotated[str | None, typer.Option(help="Who decides; by default the login name.", show_default=False)]
Reason = Annotated[str, typer.Option(help="Why, for the log.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_REFUSED = 1


@app.command()
def versions(
    model: Annotated[str | None, typer.Argument(help="Of one model; by default of all.", show_default=False)] = None,
    registry: RegistryAddress = None,
    debug: Debug = False,
) -> None:
    """Lists the registered versions, their aliases and figures.

    Example:
        numprune versions reference-llama
    """
    from tasks.registry.connection import connect, find_registry
    from tasks.registry.versions import read_versions

    with _mlflow_errors():
        found = read_versions(connect(find_registry(registry)), model)
    columns = ("model", "version", "aliases", "budget", "recipe", "revision", "perplexity", "to dense", "tokens/s")
    table = Table(*columns, "speed-up", "peak memory", "size")
    for version in found:
        figures = (_figure(version.tags, name) for name in ("perplexity", "perplexity_ratio", "tokens_per_second"))
        table.add_row(
            version.model,
            str(version.number),
            ", ".join(version.aliases),
            *(version.tags.get(name, "") for name in ("budget", "recipe")),
            version.tags.get("revision", "")[:12],
            *figures,
            _figure(version.tags, "speed_up"),
            *(_bytes(version.tags, name) for name in ("peak_memory_bytes", "checkpoint_bytes")),
        )
    _console().print(table)


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="MODEL, meaning MODEL@candidate, or MODEL@alias or MODEL/3.")],
    reason: Reason = "",
    by: By = None,
    dry_run: DryRun = False,
    registry: RegistryAddress = None,
    debug: Debug = False,
) -> None:
    """Makes a version the champion if it can be verified and meets the policy of params.yaml; exit code 1 if not.

    Example:
        numprune promote reference-llama --reason "a third faster at the same quality"
    """
    from tasks.registry.promote import promote as decide

    with _mlflow_errors():
        _show(decide(version, by=by, reason=reason, dry_run=dry_run, registry=registry))


@app.command()
def rollback(
    model: Annotated[str, typer.Argument(help="The registered model.")],
    reason: Reason = "",
    by: By = None,
    dry_run: DryRun = False,
    registry: RegistryAddress = None,
    debug: Debug = False,
) -> None:
    """Makes the champion before the present one the champion again; exit code 1 if it cannot be verified.

    Example:
        numprune rollback reference-llama --reason "repeats itself on long prompts"
    """
    from tasks.registry.promote import rollback as decide

    with _mlflow_errors():
        _show(decide(model, by=by, reason=reason, dry_run=dry_run, registry=registry))


@app.command()
def pull(
    version: Annotated[str, typer.Argument(help="MODEL, meaning MODEL@champion, or MODEL@alias or MODEL/3.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not hold anything yet.")],
    public_key: Annotated[
        Path | None,
        typer.Option(
            help="PEM file; a version that this key did not sign is refused. By default signing.public_key of "
            "params.yaml, if there is one.",
            show_default=False,
        ),
    ] = None,
    registry: RegistryAddress = None,
    debug: Debug = False,
) -> None:
    """Fetches a version into a folder, which appears only if every file and every record agrees.

    Example:
        numprune pull reference-llama@champion --output out/ --registry http://mlflow.example:5000
    """
    from tasks.parameters import PARAMETERS_FILE, Signing, load_parameters
    from tasks.registry.connection import connect, find_registry
    from tasks.registry.pull import pull as fetch

    signing, required = Signing(), public_key is not None
    if public_key is not None:
        signing = Signing(public_key=str(public_key))
    elif PARAMETERS_FILE.exists():
        parameters = load_parameters()
        signing, required = parameters.signing, parameters.promotion.signed
    with _mlflow_errors():
        pulled = fetch(connect(find_registry(registry)), version, output, signing, signature_required=required)
    typer.echo(f"{pulled.model} version {pulled.version}: {pulled.files} files in {output}, all verified.")
    if signing.public_key is None:
        typer.echo("Signatures were not checked: there is no public key. Give --public-key FILE.", err=True)


def _show(decision: "Decision") -> None:
    console = _console()
    name = f"{decision.model} version {decision.version}"
    if decision.outcome == "unchanged":
        console.print(f"{name} is the champion already.", highlight=False)
        return
    table = Table("criterion", "value", "limit", "", "why")
    for criterion in decision.criteria:
        mark = "[green]pass[/]" if criterion.passed else "[red]fail[/]"
        table.add_row(*map(escape, (criterion.name, criterion.value, criterion.limit)), mark, escape(criterion.why))
    console.print(table)
    before = "there was none" if decision.champion is None else f"before it was version {decision.champion}"
    if decision.outcome == "refused":
        stays = "there is no champion" if decision.champion is None else f"version {decision.champion} was the champion"
        console.print(f"{name} is refused: {stays}, and nothing was changed.", highlight=False)
        raise typer.Exit(_REFUSED)
    if decision.dry_run:
        console.print(f"{name} would become the champion; nothing was changed.", highlight=False)
    else:
        console.print(f"{name} is the champion; {before}.", highlight=False)


def _console() -> Console:
    console = Console()
    # Where the output is no terminal, its width is unknown, and a table cut at 80 columns cannot be read.
    return console if console.is_terminal else Console(width=200)


def _figure(tags: Mapping[str, str], name: str) -> str:
    return f"{float(tags[name]):.4g}" if name in tags else ""


def _bytes(tags: Mapping[str, str], name: str) -> str:
    from numprune.budget import readable

    return readable(float(tags[name]), "memory") if name in tags else ""


@contextmanager
def _mlflow_errors() -> Iterator[None]:
    """Turns an error of MLflow, such as a server that does not answer, into one that a user can mend."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise NumpruneError(f"MLflow: {str(error).splitlines()[0]}") from error
