"""The commands `lineage`, `verify` and `reproduce` of the command line."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tasks.parameters import PARAMETERS_FILE, Signing, load_parameters
from tasks.provenance.version_files import SIGNATURE, UNLISTED, read_digests

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

DEFAULT_ALIAS = "champion"

Reference = Annotated[
    str, typer.Argument(metavar="VERSION", help="MODEL@alias, MODEL/3, MODEL for its champion, or a folder.")
]
RegistryAddress = Annotated[
    str | None, typer.Option("--registry", help="Address of MLflow; by default that of params.yaml.")
]


@dataclass(frozen=True)
class _Found:
    """A version folder, and the version in the registry if it was named as one."""

    folder: Path
    client: "MlflowClient | None" = None
    version: "ModelVersion | None" = None


@app.command()
def lineage(
    reference: Reference,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw it into this .svg or .png file.")] = None,
    registry: RegistryAddress = None,
) -> None:
    """Shows where a version comes from: source, calibration, parameters, code, stages, environment, runs, promotions.

    Example:
        numprune lineage reference-llama@champion --picture lineage.svg
    """
    from rich.console import Console

    from tasks.provenance.lineage import draw_lineage, folder_lineage, lineage_tree, version_lineage

    with _found(reference, registry) as found:
        if found.client is not None and found.version is not None:
            told = version_lineage(found.client, found.version, found.folder)
        else:
            told = folder_lineage(found.folder)
    if picture is not None:
        draw_lineage(told, picture)
    if as_json:
        typer.echo(json.dumps(asdict(told), indent=2))
    else:
        Console(soft_wrap=True).print(lineage_tree(told))


@app.command()
def verify(
    reference: Reference,
    signed: Annotated[bool, typer.Option("--signed", help="Require a signature.")] = False,
    public_key: Annotated[
        Path | None, typer.Option(help="PEM file to check signatures with; by default signing.public_key.")
    ] = None,
    registry: RegistryAddress = None,
) -> None:
    """Recomputes all hashes of a version and compares everything that is said about it; lists what disagrees.

    Exit code 1 if anything does. For a folder, the registry is not asked.

    Example:
        numprune verify reference-llama@champion
    """
    from tasks.provenance.verify import verify_folder, verify_version

    signing = load_parameters().signing if PARAMETERS_FILE.exists() else Signing()
    if public_key is not None:
        signing = signing.model_copy(update={"public_key": str(public_key)})
    with _found(reference, registry) as found:
        if found.client is not None and found.version is not None:
            wrong = verify_version(found.client, found.version, found.folder, signing, signature_required=signed)
        else:
            wrong = verify_folder(found.folder, signing, signature_required=signed)
        digests, _ = read_digests(found.folder)
    for disagreement in wrong:
        typer.echo(str(disagreement))
    if wrong:
        typer.echo(f"{reference}: {len(wrong)} disagreement(s).", err=True)
        raise typer.Exit(1)
    if SIGNATURE not in digests:
        signature = "no signature"
    elif signing.public_key is None:
        signature = "a signature that was not checked: give --public-key"
    else:
        signature = "a valid signature"
    files = len(digests.keys() - set(UNLISTED))
    compared = "the registry and the log of promotions agree" if found.version else "the registry was not asked"
    typer.echo(f"{reference}: {files} files as stated, {signature}; {compared}.")


@app.command()
def reproduce(
    reference: Reference,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Relative difference that numbers may have; 0 asks for the same bytes.")
    ] = 0.0,
    registry: RegistryAddress = None,
) -> None:
    """Runs the stages of a version again from its record, in a worktree of its commit, and compares the results.

    Run it in a clone of the repository. The benchmark, whose outcome is time, is left out. Exit code 1 if anything is
    different.

    Example:
        numprune reproduce reference-llama/3 --tolerance 1e-3
    """
    from rich.console import Console
    from rich.table import Table

    from tasks.provenance.reproduce import Verdict
    from tasks.provenance.reproduce import reproduce as run_again

    with _found(reference, registry) as found:
        comparisons = run_again(found.folder, tolerance=tolerance)
    table = Table("output", "recorded", "reproduced", "deviation", "")
    for comparison in comparisons:
        deviation = "" if comparison.deviation is None else f"{comparison.deviation:.2g}"
        reproduced = comparison.reproduced or "missing"
        table.add_row(comparison.path, comparison.recorded[:12], reproduced[:12], deviation, comparison.verdict.value)
    Console(soft_wrap=True).print(table)
    if any(comparison.verdict is Verdict.DIFFERENT for comparison in comparisons):
        raise typer.Exit(1)


@contextmanager
def _found(reference: str, registry: str | None) -> Iterator[_Found]:
    """The version that a text names; files that had to be downloaded are removed afterwards."""
    if Path(reference).exists():
        yield _Found(Path(reference))
        return
    from tasks.registry.connection import connect, find_registry
    from tasks.registry.references import resolve
    from tasks.registry.version_folder import local_folder

    client = connect(find_registry(registry))
    version = resolve(client, reference, DEFAULT_ALIAS)
    with tempfile.TemporaryDirectory(prefix="numprune-") as temporary:
        yield _Found(local_folder(client, version, Path(temporary)), client, version)
