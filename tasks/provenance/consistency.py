"""Whether the files of a version and its evidence agree: statement, dvc.lock, parameters, plan, figures, materials."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from numprune.checkpoint import CALIBRATION_FILE, PLAN_FILE
from numprune.plan import PruningPlan
from numprune.samples import fingerprint, load_samples
from tasks.dvc_lock import LockedStage, read_lock, stages_behind, version_outputs
from tasks.layout import (
    benchmark_file,
    calibration_file,
    checkpoint_folder,
    evaluation_file,
    model_folder,
    plan_file,
)
from tasks.provenance.bom import bom_mistakes, expected_materials, materials
from tasks.provenance.disagreement import Disagreement, differing, guarded
from tasks.provenance.statement import CALIBRATION, CODE, DVC_FOLDER, SOURCE, dependencies, plain
from tasks.provenance.tensors import check_tensors
from tasks.provenance.version_files import (
    BENCHMARK,
    BOM,
    DENSE_EVALUATION,
    EVALUATION,
    LOCK,
    PARAMETERS,
    STATEMENT,
    UNLISTED,
    Digests,
    dvc_folder_hash,
    is_checkpoint_file,
    is_weights,
    read_json,
)
from tasks.registry.figures import metrics

# Tags are for reading and may be rounded.
_TAG_PRECISION = 1e-4


@dataclass(frozen=True)
class _Version:
    folder: Path
    statement: Mapping[str, Any]
    digests: Mapping[str, Digests]
    """Of the files that are there: only these are ever opened, whatever any of them says."""

    @property
    def predicate(self) -> Mapping[str, Any]:
        return self.statement["predicate"]

    @property
    def external(self) -> Mapping[str, Any]:
        return self.predicate["buildDefinition"]["externalParameters"]

    @property
    def tags(self) -> Mapping[str, str]:
        return self.predicate["buildDefinition"]["internalParameters"]["tags"]

    @cached_property
    def stages(self) -> dict[str, LockedStage]:
        return read_lock((self.folder / LOCK).read_text(encoding="utf-8"))

    @cached_property
    def made_by(self) -> dict[str, LockedStage]:
        return stages_behind(self.stages, version_outputs(self.external["model"], self.external["budget"]))

    @property
    def origin(self) -> Mapping[str, Any]:
        return dependencies(self.statement, SOURCE)[SOURCE]["annotations"]


def check_evidence(folder: Path, statement: Mapping[str, Any], digests: Mapping[str, Digests]) -> list[Disagreement]:
    """What disagrees between a statement, the files it is about, and what they say of each other.

    Args:
        folder: The version folder.
        statement: Its statement, parsed.
        digests: Of all its plain files.
    """
    version = _Version(folder, statement, digests)
    found = list(_files(version))
    checks = (
        (LOCK, _lock),
        (LOCK, _hashes),
        (f"{STATEMENT}: source", _source),
        (PARAMETERS, _parameters),
        (PLAN_FILE, _plan),
        (f"{STATEMENT}: tags", _tags),
        (f"{EVALUATION} and the others", _figures),
        (BOM, _bom),
        (PLAN_FILE, lambda of: check_tensors(of.folder, set(of.digests))),
    )
    for where, check in checks:
        found.extend(guarded(where, lambda check=check: check(version)))  # type: ignore[misc]
    return found


def _files(version: _Version) -> Iterator[Disagreement]:
    listed = {entry["name"]: entry["digest"]["sha256"] for entry in version.statement["subject"]}
    there = {name: digest.sha256 for name, digest in version.digests.items() if name not in UNLISTED}
    for name in sorted(listed.keys() | there.keys()):
        if name not in there:
            yield Disagreement(name, "is missing: the statement lists it")
        elif name not in listed:
            yield Disagreement(name, "is an extra file: the statement does not list it")
        elif listed[name] != there[name]:
            yield Disagreement(name, f"was changed: its SHA-256 is {there[name]}, the statement says {listed[name]}")


def _lock(version: _Version) -> Iterator[Disagreement]:
    made = {path: md5 for stage in version.made_by.values() for path, md5 in stage.outputs.items()}
    recorded = {
        entry["name"]: entry["digest"].get(DVC_FOLDER, entry["digest"].get("md5"))
        for entry in version.predicate["runDetails"]["byproducts"]
    }
    for path in sorted(made.keys() | recorded.keys()):
        yield from differing(f"{LOCK}: {path}", made.get(path), recorded.get(path), "the statement")
    for stage in version.made_by.values():
        for path, md5 in stage.dependencies.items():
            if path in made:
                where = f"{LOCK}: {path} as {stage.name} read it"
                yield from differing(where, md5, made[path], "the stage that made it")


def _hashes(version: _Version) -> Iterator[Disagreement]:
    """The results in the folder are those that dvc.lock names."""
    model, budget = version.external["model"], version.external["budget"]
    locked = {path: md5 for stage in version.stages.values() for path, md5 in stage.outputs.items()}
    files = {
        EVALUATION: evaluation_file(model, budget),
        DENSE_EVALUATION: evaluation_file(model, None),
        BENCHMARK: benchmark_file(model, budget),
        PLAN_FILE: plan_file(model, budget),
    }
    for name, path in files.items():
        md5 = version.digests[name].md5 if name in version.digests else None
        yield from differing(f"{name}: its MD5", md5, locked.get(path.as_posix()), f"{LOCK} ({path})")
    checkpoint = {name: digest.md5 for name, digest in version.digests.items() if is_checkpoint_file(name)}
    path = checkpoint_folder(model, budget)
    source = f"{LOCK} ({path})"
    yield from differing("the checkpoint: DVC's hash", dvc_folder_hash(checkpoint), locked.get(path.as_posix()), source)


def _source(version: _Version) -> Iterator[Disagreement]:
    entries = dependencies(version.statement, SOURCE)
    files = {name.removeprefix(f"{SOURCE}/"): entry["digest"] for name, entry in entries.items() if name != SOURCE}
    folder = model_folder(version.external["model"]).as_posix()
    found = dvc_folder_hash({name: digest["md5"] for name, digest in files.items()})
    read: set[str | None] = {
        md5 for stage in version.made_by.values() for path, md5 in stage.dependencies.items() if path == folder
    }
    for md5 in read or {None}:
        yield from differing(f"{STATEMENT}: source: DVC's hash of its files", found, md5, f"{LOCK} ({folder})")
    plan = PruningPlan.load(version.folder / PLAN_FILE)
    stated = entries[SOURCE]["digest"]["fingerprint"]
    yield from differing(f"{PLAN_FILE}: source.fingerprint", plan.source.fingerprint, stated, "the statement")
    digest = hashlib.sha256()
    for name in ("config.json", *version.origin["weights"]):
        digest.update(bytes.fromhex(files[name]["sha256"]))
    yield from differing(f"{STATEMENT}: source: fingerprint of its files", digest.hexdigest(), stated, "the statement")


def _parameters(version: _Version) -> Iterator[Disagreement]:
    content = plain(yaml.safe_load((version.folder / PARAMETERS).read_text(encoding="utf-8")))
    for key, found, stated in _leaves(content, version.external["parameters"]):
        if not _same(found, stated):
            yield from differing(f"{PARAMETERS}: {key}", found, stated, "the statement")
    for stage in version.made_by.values():
        for key, locked in stage.parameters.items():
            where = f"{PARAMETERS}: {key}"
            yield from differing(where, _lookup(content, key), plain(locked), f"{LOCK} ({stage.name})")


def _plan(version: _Version) -> Iterator[Disagreement]:
    plan, content = PruningPlan.load(version.folder / PLAN_FILE), read_json(version.folder / PLAN_FILE)
    yield from differing(f"{PLAN_FILE}: budget", plan.budget, version.external["budget"], "the statement")
    derived = {
        "achieved_ratio": plan.achieved_ratio,
        "parameters": {"dense": plan.dense_parameters, "pruned": plan.kept_parameters},
    }
    for key, value in derived.items():
        yield from differing(f"{PLAN_FILE}: {key}", content.get(key), value, "the list of kept units")
    for name, group in plan.groups.items():
        counted = content["groups"][name].get("kept_units")
        yield from differing(f"{PLAN_FILE}: {name}: kept_units", counted, len(group.kept), "the list of kept units")
    stated = dependencies(version.statement, CALIBRATION)[CALIBRATION]["digest"]["tokensSha256"]
    yield from differing(f"{PLAN_FILE}: source.calibration", plan.source.calibration, stated, "the statement")
    if CALIBRATION_FILE in version.digests:
        tokens = fingerprint(load_samples(version.folder / CALIBRATION_FILE))
        yield from differing(f"{CALIBRATION_FILE}: SHA-256 of its tokens", tokens, stated, "the statement")


def _tags(version: _Version) -> Iterator[Disagreement]:
    """The tags that the statement records follow from the rest."""
    model, budget = version.external["model"], version.external["budget"]
    locked = {
        path: md5 for stage in version.made_by.values() for path, md5 in {**stage.dependencies, **stage.outputs}.items()
    }
    code = dependencies(version.statement, CODE)[CODE]
    hashes = {
        "content_hash": checkpoint_folder(model, budget),
        "source_hash": model_folder(model),
        "calibration_hash": calibration_file(model),
        "plan_hash": plan_file(model, budget),
    }
    expected = {"model": model, "budget": budget, "git_commit": code.get("digest", {}).get("gitCommit", "none")}
    expected |= {"git_dirty": code["annotations"]["changed_since_commit"]}
    expected |= {tag: locked.get(path.as_posix()) for tag, path in hashes.items()}
    for tag, value in expected.items():
        if tag in version.tags:
            yield from differing(f"{STATEMENT}: tag {tag}", version.tags[tag], value, "the evidence")


def _figures(version: _Version) -> Iterator[Disagreement]:
    """Figures that another release of this code derives besides, or no longer, say nothing about this version."""
    measured = read_figures(version.folder)
    stated = version.predicate["buildDefinition"]["internalParameters"]["figures"]
    for name in sorted(measured.keys() & stated.keys()):
        yield from differing(f"{STATEMENT}: figure {name}", float(stated[name]), measured[name], "the measurement")
    for tag in sorted(measured.keys() & version.tags.keys()):
        if not math.isclose(float(version.tags[tag]), measured[tag], rel_tol=_TAG_PRECISION):
            where = f"{STATEMENT}: tag {tag}"
            yield from differing(where, version.tags[tag], measured[tag], "the measurement")


def _bom(version: _Version) -> Iterator[Disagreement]:
    text = (version.folder / BOM).read_text(encoding="utf-8")
    mistakes = bom_mistakes(text)
    yield from (Disagreement(BOM, f"does not fit the schema of CycloneDX: {mistake}") for mistake in mistakes)
    if mistakes:
        return
    weights = {name: digest.sha256 for name, digest in version.digests.items() if is_weights(name)}
    found = materials(read_json(version.folder / BOM))
    expected = expected_materials(version.predicate, weights)
    for name in sorted(found.keys() | expected.keys()):
        yield from differing(f"{BOM}: {name}", found.get(name), expected.get(name), "the statement")


def read_figures(folder: Path) -> dict[str, float]:
    """The figures of a version folder.

    Raises:
        NumpruneError: If a metric file is missing or damaged.
    """
    files = {
        "plan.json": PLAN_FILE,
        "evaluation.json": EVALUATION,
        "dense/evaluation.json": DENSE_EVALUATION,
        "benchmark.json": BENCHMARK,
    }
    return metrics({key: read_json(folder / name) for key, name in files.items()})


def _leaves(content: Any, stated: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every value of `content`, with that of the same key in `stated`, which may have more keys."""
    if isinstance(content, Mapping):
        inside = stated if isinstance(stated, Mapping) else {}
        for name, value in content.items():
            yield from _leaves(value, inside.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(content, list) and isinstance(stated, list) and len(content) == len(stated):
        for number, (value, its) in enumerate(zip(content, stated, strict=True)):
            yield from _leaves(value, its, f"{key}[{number}]")
    else:
        yield key, content, stated


def _same(found: Any, stated: Any) -> bool:
    """Whether a value of a YAML file and the one it was read as are the same: 0.2 and "0.2", "1e-3" and 0.001."""
    if found == stated or str(found) == str(stated):
        return True
    try:
        return float(found) == float(stated)
    except (TypeError, ValueError):
        return False


def _lookup(content: Any, key: str) -> Any:
    """The value at a dotted key; names may have dots themselves."""
    if not isinstance(content, Mapping):
        return None
    if key in content:
        return content[key]
    parts = key.split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        if name in content:
            return _lookup(content[name], ".".join(parts[end:]))
    return None
