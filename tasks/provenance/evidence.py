"""Write the evidence of a version into its folder: what was run, what came out, where it comes from, who vouches."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numprune.checkpoint import PLAN_FILE
from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from numprune.plan import PruningPlan
from tasks.dvc_lock import read_lock, stages_behind, version_outputs
from tasks.parameters import PARAMETERS_FILE, Signing, load_parameters
from tasks.provenance.bom import bom_mistakes, make_bom
from tasks.provenance.build import Build
from tasks.provenance.card import make_card, source_licence
from tasks.provenance.consistency import check_evidence, read_figures
from tasks.provenance.signing import sign_folder
from tasks.provenance.statement import parse_statement, predicate, statement
from tasks.provenance.version_files import (
    BENCHMARK,
    BOM,
    CARD,
    DENSE_EVALUATION,
    EVALUATION,
    LOCK,
    PARAMETERS,
    STATEMENT,
    digest_file,
    is_weights,
    read_digests,
    read_json,
)

_LOCK_FILE = Path("dvc.lock")
_METRIC_FILES = {
    EVALUATION: "evaluation.json",
    DENSE_EVALUATION: "dense/evaluation.json",
    BENCHMARK: "benchmark.json",
}


def write_evidence(folder: Path, build: Build, signing: Signing) -> str:
    """Completes a version folder that holds the checkpoint and what serves it; only adds files.

    `params.yaml`, `dvc.lock`, the source model, git and the environment are read from where the process runs.

    Args:
        folder: The version folder.
        build: What it holds and how it came about.
        signing: The folder is signed if there is a key.

    Returns:
        SHA-256 of the statement.

    Raises:
        NumpruneError: If the folder has evidence already, holds links, does not agree with `dvc.lock`, or cannot be
            signed. The folder is then not to be used.
    """
    copied = {PARAMETERS: PARAMETERS_FILE, LOCK: _LOCK_FILE}
    copied |= {name: build.metric_files[key] for name, key in _METRIC_FILES.items()}
    for name, path in copied.items():
        _copy_new(path, folder / name)
    parameters = load_parameters()
    plan = PruningPlan.load(folder / PLAN_FILE)
    recorded = read_lock(_LOCK_FILE.read_text(encoding="utf-8"))
    stages = stages_behind(recorded, version_outputs(build.model, build.budget))
    measured = read_figures(folder)
    provenance = predicate(build, parameters, stages, plan.source, figures=measured, signed=signing.key is not None)

    digests, irregular = read_digests(folder)
    if irregular:
        listed = ", ".join(f"{entry.name} ({entry.kind})" for entry in irregular)
        raise NumpruneError(f"{folder} holds something else than files: {listed}. A version is made of files only.")
    evaluation, benchmark = read_json(folder / EVALUATION), read_json(folder / BENCHMARK)
    licence = source_licence(build.model)
    config = read_json(folder / "config.json")
    weights = {name: digest.sha256 for name, digest in digests.items() if is_weights(name)}
    bom = _json(make_bom(provenance, config, weights, measured, licence))
    if mistakes := bom_mistakes(bom):
        raise NumpruneError(f"The bill of materials does not fit its schema: {'; '.join(mistakes)}")
    protocols = {"evaluation": evaluation.get("protocol", {}), "benchmark": benchmark.get("protocol", {})}
    written = {BOM: bom, CARD: make_card(provenance, measured, protocols, licence, config)}
    for name, text in written.items():
        _write_new(text, folder / name)
        digests[name] = digest_file(folder / name)

    content = _json(statement(digests, provenance))
    disagreements = check_evidence(folder, parse_statement(content), digests)
    if disagreements:
        listed = "".join(f"\n  {disagreement}" for disagreement in disagreements)
        raise NumpruneError(f"The results do not belong together: run `dvc repro` first.{listed}")
    _write_new(content, folder / STATEMENT)
    if signing.key is not None:
        sign_folder(folder, signing)
    return digest_file(folder / STATEMENT).sha256


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _copy_new(source: Path, target: Path) -> None:
    _check_new(target)
    try:
        with replace_on_success(target) as temporary:
            shutil.copyfile(source, temporary)
    except FileNotFoundError:
        raise NumpruneError(f"{source} not found in {Path.cwd()}: run `dvc repro` first.") from None


def _write_new(text: str, target: Path) -> None:
    _check_new(target)
    with replace_on_success(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _check_new(target: Path) -> None:
    # What is there may be a hard link into DVC's cache.
    if target.exists() or target.is_symlink():
        raise NumpruneError(f"{target} is there already: evidence is written into a folder that has none.")
