"""The provenance statement: an in-toto statement about all files of a version, with a SLSA provenance predicate.

subject                       every file of the folder, by its SHA-256
predicate
  buildDefinition
    externalParameters        model, budget, all of params.yaml
    internalParameters        environment, orchestrator's run, tags of the version, whether it is signed
    resolvedDependencies      source/<file> ..., calibration, code
  runDetails
    builder                   numprune, and the versions of the packages that matter
    metadata                  MLflow's run, time
    byproducts                what every stage made, by DVC's hashes
"""

import json
import math
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from numprune.checkpoint import weight_files
from numprune.errors import NumpruneError
from numprune.plan import Source
from tasks.dvc_lock import LockedStage
from tasks.layout import calibration_file, model_folder
from tasks.parameters import Parameters
from tasks.provenance.build import Build
from tasks.provenance.environment import package_versions, read_environment
from tasks.provenance.version_files import UNLISTED, Digests, model_digests

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:numprune:compress:1"
BUILDER = "urn:numprune:publish:1"

SOURCE, CALIBRATION, CODE = "source", "calibration", "code"
DVC_FOLDER = "dvcFolder"
"""Algorithm of DVC's hash of a folder; that of a file is plain MD5."""


def predicate(
    build: Build,
    parameters: Parameters,
    stages: Mapping[str, LockedStage],
    source: Source,
    *,
    figures: Mapping[str, float],
    signed: bool,
) -> dict[str, Any]:
    """The SLSA provenance of a version.

    Args:
        build: What is being registered.
        parameters: All of `params.yaml`.
        stages: The stages of `dvc.lock` that made it.
        source: What the pruning plan says of source model and calibration.
        figures: What was measured, as MLflow has it.
        signed: Whether the version will carry a signature; without one it is then not whole.
    """
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "model": build.model,
                "budget": build.budget,
                "parameters": plain(parameters.model_dump(mode="json")),
            },
            "internalParameters": {
                "recipe": build.recipe,
                "environment": read_environment(),
                "orchestrator": dict(build.orchestrator),
                "tags": dict(build.tags),
                "figures": plain(figures),
                "signed": signed,
            },
            "resolvedDependencies": [
                *_source_files(build.model, stages, source),
                _calibration(build.model, parameters, stages, source),
                _code(build.tags),
            ],
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": package_versions()},
            "metadata": {"invocationId": build.run_id, "finishedOn": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")},
            "byproducts": [
                {"name": path, "digest": _dvc_digest(md5), "annotations": {"stage": stage.name}}
                for stage in stages.values()
                for path, md5 in stage.outputs.items()
            ],
        },
    }


def statement(digests: Mapping[str, Digests], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The statement that some files have a provenance."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": digest.sha256}}
            for name, digest in sorted(digests.items())
            if name not in UNLISTED
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": provenance,
    }


def parse_statement(text: str) -> dict[str, Any]:
    """Reads a statement and checks it against the schemas of in-toto and SLSA.

    Raises:
        NumpruneError: If it is no such statement.
    """
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
        message = json_format.ParseDict(content, statement_pb2.Statement())
        Statement.copy_from_pb(message).validate()
        if content["predicateType"] != PREDICATE_TYPE:
            raise ValueError(f"predicateType must be {PREDICATE_TYPE}, got {content['predicateType']}")
        json_format.ParseDict(content["predicate"], provenance_pb2.Provenance())
        if content["predicate"]["buildDefinition"]["buildType"] != BUILD_TYPE:
            raise ValueError(f"buildType must be {BUILD_TYPE}")
        _check_completeness(content)
    except (json_format.ParseError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise NumpruneError(f"no provenance statement: {reason[0]}") from None
    return content


def dependencies(content: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """What a statement depended on: `source` gives `source/config.json` and so on, `code` the one entry `code`."""
    entries = content["predicate"]["buildDefinition"]["resolvedDependencies"]
    return {entry["name"]: entry for entry in entries if entry["name"].partition("/")[0] == name}


def plain(value: Any) -> Any:
    """The same value with texts for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _source_files(model: str, stages: Mapping[str, LockedStage], source: Source) -> list[dict[str, Any]]:
    """One entry a file of the source model, after one that says where all of them come from."""
    folder = model_folder(model)
    origin = _origin(model, stages)
    entries = []
    for name, digests in model_digests(folder).items():
        entry: dict[str, Any] = {"name": f"{SOURCE}/{name}", "digest": {"sha256": digests.sha256, "md5": digests.md5}}
        if repository := origin.get("repository"):
            entry["downloadLocation"] = f"https://huggingface.co/{repository}/resolve/{origin['revision']}/{name}"
        entries.append(entry)
    # Those that the fingerprint goes over, in its order.
    weights = [path.name for path in weight_files(folder)]
    annotations = {**origin, "weights": weights}
    return [{"name": SOURCE, "digest": {"fingerprint": source.fingerprint}, "annotations": annotations}, *entries]


def _origin(model: str, stages: Mapping[str, LockedStage]) -> dict[str, str]:
    """Where a source model was fetched from, by the record of the stage that did, whatever params.yaml says since."""
    path = model_folder(model).as_posix()
    fetched = next((stage for stage in stages.values() if path in stage.outputs), None)
    download = fetched.parameters.get(f"downloads.{model}") if fetched else None
    if not download:
        return {"kind": "folder of the code's repository", "path": path}
    kind = "Hugging Face Hub" if download.get("repository") else "folder"
    return {"kind": kind, **{key: str(value) for key, value in download.items() if value is not None}}


def _calibration(
    model: str, parameters: Parameters, stages: Mapping[str, LockedStage], source: Source
) -> dict[str, Any]:
    drawn = calibration_file(model).as_posix()
    stage = next((stage for stage in stages.values() if drawn in stage.outputs), None)
    settings = parameters.calibration
    annotations: dict[str, Any] = {
        "data": settings.data,
        "samples": settings.samples,
        "length": settings.length,
        "seed": settings.seed,
    }
    if stage is not None and settings.data in stage.dependencies:
        annotations["data_md5"] = stage.dependencies[settings.data]
    # Of the token ids and their shape, as in the plan, rather than of a file.
    return {"name": CALIBRATION, "digest": {"tokensSha256": source.calibration}, "annotations": annotations}


def _code(tags: Mapping[str, str]) -> dict[str, Any]:
    commit, dirty = tags.get("git_commit", "none"), tags.get("git_dirty", "unknown")
    entry: dict[str, Any] = {"name": CODE, "annotations": {"changed_since_commit": dirty}}
    if commit != "none":
        entry["digest"] = {"gitCommit": commit}
    if uri := _origin_without_credentials():
        entry["uri"] = uri
    return entry


def _origin_without_credentials() -> str | None:
    command = ["git", "remote", "get-url", "origin"]
    try:
        url = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https", "ssh", "git"} or not parts.hostname:
        return None  # A path of this machine says nothing to others.
    place = parts.hostname + (f":{parts.port}" if parts.port else "")
    return f"git+{parts.scheme}://{place}{parts.path}"


def _dvc_digest(value: str) -> dict[str, str]:
    return {DVC_FOLDER: value} if value.endswith(".dir") else {"md5": value}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # A reader that takes the first of two equal keys and one that takes the last would see two statements.
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is there twice")
    return content


def _check_completeness(content: Mapping[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError if something is missing that every statement of ours has."""
    names = [entry["name"] for entry in content["subject"]]
    if len(set(names)) != len(names) or not all("sha256" in entry["digest"] for entry in content["subject"]):
        raise ValueError("every file must be listed once, with its sha256")
    definition, details = content["predicate"]["buildDefinition"], content["predicate"]["runDetails"]
    for section, keys in (
        (definition["externalParameters"], ("model", "budget", "parameters")),
        (definition["internalParameters"], ("recipe", "environment", "orchestrator", "tags", "figures", "signed")),
        (details, ("builder", "byproducts")),
        (details["metadata"], ("invocationId", "finishedOn")),
        (details["builder"], ("id", "version")),
    ):
        for key in keys:
            if key not in section:
                raise ValueError(f"{key} is missing")
    for name in (SOURCE, CALIBRATION, CODE):
        if name not in {entry["name"] for entry in definition["resolvedDependencies"]}:
            raise ValueError(f"the dependency {name} is missing")
