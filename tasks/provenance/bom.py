"""The bill of materials of a version: a CycloneDX ML-BOM with source model, calibration data and software."""

import json
import uuid
from collections.abc import Mapping
from typing import Any

from tasks.provenance.statement import CALIBRATION, SOURCE

SPECIFICATION = "1.6"
_MODEL, _SOURCE, _CALIBRATION = "model", "source-model", "calibration-data"

LIMITS = (
    "Quality was measured as perplexity on the text named in the protocol; other tasks, languages and safety were not.",
    "Speed and memory hold for the hardware and the workload of the protocol.",
    "What the source model gets wrong, and its biases, are still there; pruning may have added to them.",
)


def make_bom(
    provenance: Mapping[str, Any],
    config: Mapping[str, Any],
    weights: Mapping[str, str],
    figures: Mapping[str, float],
    licence: str | None,
) -> dict[str, Any]:
    """The bill of materials. The library has no model cards, so it is made as a dictionary and checked by the schema.

    Args:
        provenance: The predicate of the statement.
        config: `config.json` of the pruned model.
        weights: SHA-256 of every file of the pruned weights.
        figures: What was measured, by name.
        licence: Of the source model, if its card or configuration names one.
    """
    definition, details = provenance["buildDefinition"], provenance["runDetails"]
    model, budget = (definition["externalParameters"][key] for key in ("model", "budget"))
    content_hash = definition["internalParameters"]["tags"].get("content_hash", "")
    source = _source(model, definition["resolvedDependencies"], licence)
    calibration = _calibration(definition["resolvedDependencies"])
    packages = [_package(name, version) for name, version in details["builder"]["version"].items()]
    pruned = {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": f"{model}-{budget}",
        "version": content_hash or "unknown",
        "description": f"{model}, pruned by numprune to the budget {budget}.",
        **_licences(licence),
        "components": [_file(f"pruned/{name}", name, sha256) for name, sha256 in sorted(weights.items())],
        "pedigree": {"ancestors": [{key: source[key] for key in ("type", "name", "version", "purl") if key in source}]},
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": str(config.get("model_type", "unknown")),
                "modelArchitecture": ", ".join(config.get("architectures") or ["unknown"]),
                "datasets": [{"ref": _CALIBRATION}],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [{"type": name, "value": repr(value)} for name, value in sorted(figures.items())]
            },
            "considerations": {"technicalLimitations": list(LIMITS)},
        },
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "serialNumber": uuid.uuid4().urn,
        "version": 1,
        "metadata": {
            "timestamp": details["metadata"]["finishedOn"],
            "tools": {"components": [_package("numprune", details["builder"]["version"].get("numprune"))]},
            "component": pruned,
        },
        "components": [source, calibration, *packages],
        "dependencies": [
            {"ref": _MODEL, "dependsOn": [_SOURCE, _CALIBRATION, *(package["bom-ref"] for package in packages)]}
        ],
    }


def bom_mistakes(text: str) -> list[str]:
    """What the strict schema of CycloneDX finds wrong."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    try:
        if json.loads(text).get("specVersion") != SPECIFICATION:
            return [f"specVersion must be {SPECIFICATION}"]
        errors = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text, all_errors=True)
    except (ValueError, AttributeError) as error:
        return [f"no JSON object: {error}"]
    return [str(error.data.message).splitlines()[0] for error in errors or []]


def materials(bom: Mapping[str, Any]) -> dict[str, str]:
    """What a bill of materials says about each material: hash of a file, or version of a package."""
    found: dict[str, str] = {}
    for component in [bom["metadata"]["component"], *bom["components"]]:
        for file in component.get("components", []):
            found[file["bom-ref"]] = file["hashes"][0]["content"]
        if component["type"] == "library":
            found[f"package/{component['name']}"] = component["version"]
        if component["type"] == "data":
            found[CALIBRATION] = component["hashes"][0]["content"]
    return found


def expected_materials(provenance: Mapping[str, Any], weights: Mapping[str, str]) -> dict[str, str]:
    """What `materials` must give for a provenance."""
    entries = provenance["buildDefinition"]["resolvedDependencies"]
    found = {f"pruned/{name}": sha256 for name, sha256 in weights.items()}
    for entry in entries:
        if entry["name"].startswith(f"{SOURCE}/"):
            found[entry["name"]] = entry["digest"]["sha256"]
        if entry["name"] == CALIBRATION:
            found[CALIBRATION] = entry["digest"]["tokensSha256"]
    return found | {
        f"package/{name}": version for name, version in provenance["runDetails"]["builder"]["version"].items()
    }


def _source(model: str, entries: list[dict[str, Any]], licence: str | None) -> dict[str, Any]:
    origin = next(entry["annotations"] for entry in entries if entry["name"] == SOURCE)
    files = [entry for entry in entries if entry["name"].startswith(f"{SOURCE}/")]
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": _SOURCE,
        "name": origin.get("repository", model),
        **_licences(licence),
        "components": [
            _file(file["name"], file["name"].removeprefix(f"{SOURCE}/"), file["digest"]["sha256"]) for file in files
        ],
    }
    if "revision" in origin:
        component["version"] = origin["revision"]
    if "repository" in origin:
        component["purl"] = f"pkg:huggingface/{origin['repository']}@{origin['revision']}"
    return component


def _calibration(entries: list[dict[str, Any]]) -> dict[str, Any]:
    entry = next(entry for entry in entries if entry["name"] == CALIBRATION)
    drawn = entry["annotations"]
    length = f"{drawn['length']} tokens" if drawn["length"] else "the default length"
    return {
        "type": "data",
        "bom-ref": _CALIBRATION,
        "name": drawn["data"],
        "description": f"{drawn['samples']} sequences of {length}, drawn with seed {drawn['seed']}; the hash is that "
        "of the token ids and their shape.",
        "hashes": [{"alg": "SHA-256", "content": entry["digest"]["tokensSha256"]}],
        "data": [{"type": "dataset", "name": drawn["data"]}],
    }


def _package(name: str, version: str | None) -> dict[str, Any]:
    known = version or "unknown"
    # Local versions, such as 2.13.0+cpu, have a plus sign, which purls escape.
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{known.replace('+', '%2B')}"
    return {"type": "library", "bom-ref": f"package/{name}", "name": name, "version": known, "purl": purl}


def _file(reference: str, name: str, sha256: str) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": reference,
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": sha256}],
    }


def _licences(licence: str | None) -> dict[str, Any]:
    # By name: cards write identifiers in their own way, and SPDX's list is closed.
    return {"licenses": [{"license": {"name": licence}}]} if licence else {}
