"""Verify a version: its files, its evidence, its signature, and what the registry says of it.

Nothing of a version is executed, unpickled or believed: files are opened by names that were found in the folder, links
are not followed, and every statement is compared with what can be counted or hashed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from numprune.budget import BudgetKind
from numprune.errors import NumpruneError
from tasks.parameters import Signing
from tasks.provenance.consistency import check_evidence
from tasks.provenance.disagreement import Disagreement, differing, guarded
from tasks.provenance.signing import check_folder_signature
from tasks.provenance.statement import parse_statement
from tasks.provenance.version_files import DOWNLOAD_MARK, SIGNATURE, STATEMENT, digest_file, read_digests

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["Disagreement", "verify_folder", "verify_version"]


def verify_folder(folder: Path, signing: Signing, *, signature_required: bool = False) -> list[Disagreement]:
    """Recomputes everything about a version folder and says what disagrees.

    Without a signature this shows that a folder agrees with itself, not who made it: whoever can rewrite all of it,
    statement included, goes unseen. The hash of the statement in the registry, or the signature, rules that out.

    Args:
        folder: A version folder.
        signing: Its public key checks the signature.
        signature_required: Whether a missing signature, or one that cannot be checked, is a disagreement. It always
            is if the statement says that the version was signed.

    Raises:
        NumpruneError: If there is no such folder, or the public key cannot be read.
    """
    if not folder.is_dir():
        raise NumpruneError(f"{folder} is no folder.")
    digests, irregular = read_digests(folder)
    found = [Disagreement(entry.name, f"is {entry.kind}: a version holds plain files only") for entry in irregular]
    if DOWNLOAD_MARK in digests:
        found.extend(guarded(DOWNLOAD_MARK, lambda: _download_mark(folder)))
    signed = signature_required
    if STATEMENT not in digests:
        found.append(Disagreement(STATEMENT, "is missing: nothing says what the folder should hold"))
    else:
        try:
            statement = parse_statement((folder / STATEMENT).read_text(encoding="utf-8"))
        except (NumpruneError, UnicodeDecodeError) as error:
            found.append(Disagreement(STATEMENT, f"cannot be read: {error}"))
        else:
            found.extend(check_evidence(folder, statement, digests))
            signed = signed or bool(statement["predicate"]["buildDefinition"]["internalParameters"]["signed"])
    if SIGNATURE not in digests:
        if signed:
            found.append(Disagreement(SIGNATURE, "is missing: the version has to be signed"))
    elif signing.public_key is not None:
        wrong = check_folder_signature(folder, signing)
        found.extend([Disagreement(SIGNATURE, wrong)] if wrong else [])
    elif signature_required:
        found.append(Disagreement(SIGNATURE, "cannot be checked: signing.public_key is not set"))
    return found


def verify_version(
    client: "MlflowClient", version: "ModelVersion", folder: Path, signing: Signing, *, signature_required: bool = False
) -> list[Disagreement]:
    """Verifies a registered version: its folder, what MLflow says of it, its aliases and the log of promotions.

    Args:
        client: Of the registry.
        version: The version, as the registry has it now.
        folder: Its files.
        signing: Its public key checks signatures.
        signature_required: As in `verify_folder`.

    Raises:
        NumpruneError: As in `verify_folder`.
    """
    found = verify_folder(folder, signing, signature_required=signature_required)
    where = f"{version.name} version {version.version}"
    path = folder / STATEMENT
    if path.is_file() and not path.is_symlink():
        found.extend(guarded(f"{where}: tags", lambda: _tags(version, folder)))
        found.extend(guarded(f"{where}: run", lambda: _run(client, version, folder)))
    if (folder / DOWNLOAD_MARK).is_file():
        found.extend(guarded(DOWNLOAD_MARK, lambda: _download_mark(folder, version)))
    found.extend(guarded(f"{where}: aliases", lambda: _aliases(client, version)))
    found.extend(guarded("promotion log", lambda: _promotions(client, version, folder, signing)))
    return found


def _download_mark(folder: Path, version: "ModelVersion | None" = None) -> Iterator[Disagreement]:
    """MLflow's note says which version was downloaded, and nothing else."""
    content = yaml.safe_load((folder / DOWNLOAD_MARK).read_text(encoding="utf-8"))
    keys = sorted(content) if isinstance(content, Mapping) else content
    yield from differing(f"{DOWNLOAD_MARK}: keys", keys, ["model_name", "model_version"], "MLflow")
    if version is not None:
        named = (content.get("model_name"), str(content.get("model_version")))
        yield from differing(DOWNLOAD_MARK, named, (version.name, str(version.version)), "the registry")


def _tags(version: "ModelVersion", folder: Path) -> Iterator[Disagreement]:
    found = digest_file(folder / STATEMENT).sha256
    yield from differing(f"{STATEMENT}: its SHA-256", found, version.tags.get("statement_hash"), "the tag in MLflow")
    statement = parse_statement((folder / STATEMENT).read_text(encoding="utf-8"))
    definition = statement["predicate"]["buildDefinition"]
    for tag, value in sorted(definition["internalParameters"]["tags"].items()):
        yield from differing(f"MLflow: tag {tag}", version.tags.get(tag), value, "the statement")
    model = definition["externalParameters"]["model"]
    yield from differing("MLflow: registered model", version.name, model, "the statement")


def _run(client: "MlflowClient", version: "ModelVersion", folder: Path) -> Iterator[Disagreement]:
    statement = parse_statement((folder / STATEMENT).read_text(encoding="utf-8"))
    stated = statement["predicate"]["runDetails"]["metadata"]["invocationId"]
    yield from differing("MLflow: run", version.run_id, stated, "the statement")
    run = client.get_run(stated)
    definition = statement["predicate"]["buildDefinition"]
    for name, stated_value in sorted(definition["internalParameters"]["figures"].items()):
        value = float(stated_value)
        if name not in run.data.metrics:
            yield Disagreement(f"MLflow: metric {name}", f"is missing, but the statement says {value}")
            continue
        points = {point.value for point in client.get_metric_history(stated, name)} | {run.data.metrics[name]}
        for point in sorted(points - {value}):
            yield from differing(f"MLflow: metric {name}", point, value, "the statement")
    parameters = definition["externalParameters"]["parameters"]
    for name, text in sorted(run.data.params.items()):
        section, _, key = name.partition(".")
        if isinstance(parameters.get(section), Mapping) and key in parameters[section]:
            yield from differing(f"MLflow: parameter {name}", text, str(parameters[section][key]), "the statement")


def _aliases(client: "MlflowClient", version: "ModelVersion") -> Iterator[Disagreement]:
    """Aliases of budgets; the log of promotions is asked about the champion's."""
    from tasks.publish import budget_alias

    own = budget_alias(version.tags.get("budget", ""))
    for alias, number in sorted(client.get_registered_model(version.name).aliases.items()):
        if int(number) == int(version.version) and alias.partition("-")[0] in get_args(BudgetKind) and alias != own:
            yield Disagreement(f"MLflow: alias {alias}", f"points at version {number}, whose own alias is {own}")


def _promotions(
    client: "MlflowClient", version: "ModelVersion", folder: Path, signing: Signing
) -> Iterator[Disagreement]:
    from tasks.registry.promotion_log import check_log, read_promotions

    yield from (Disagreement("promotion log:", line) for line in check_log(client, version.name, signing))
    path = folder / STATEMENT
    found: Any = digest_file(path).sha256 if path.is_file() and not path.is_symlink() else None
    for promotion in read_promotions(client, version.name):
        if promotion.version == int(version.version):
            where = f"{STATEMENT}: its SHA-256"
            yield from differing(where, found, promotion.statement_hash, f"promotion {promotion.number}")
