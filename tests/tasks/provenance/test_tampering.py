"""Whatever is changed about a version is found, and the finding names it."""

import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.parameters import Signing
from tasks.provenance.signing import sign_folder
from tasks.provenance.verify import verify_folder, verify_version
from tasks.provenance.version_files import BOM, LOCK, PARAMETERS, SIGNATURE, STATEMENT, digest_file
from tasks.registry.promotion_log import LOG
from tests.tasks.provenance.conftest import MODEL, Version, signing_of

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "ragged.py",
    "pruning_plan.json",
    "calibration/input_ids.safetensors",
    "MLmodel",
    "serving/numprune_serving.py",
    "README.md",
    "provenance/params.yaml",
    "provenance/dvc.lock",
    "provenance/evaluation.json",
    "provenance/dense_evaluation.json",
    "provenance/benchmark.json",
    "provenance/statement.json",
    "provenance/bom.cdx.json",
    "model.sig",
)

Change = Callable[[Version], None]


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    overwrite(path, bytes(content))


def overwrite(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    overwrite(path, text.replace(old, new, 1))


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    overwrite(path, json.dumps(content, indent=2) + "\n")


def rewrite_statement(folder: Path) -> None:
    """What a forger does after a change: the statement lists the files as they are now."""

    def restate(content: Any) -> None:
        for entry in content["subject"]:
            entry["digest"]["sha256"] = digest_file(folder / entry["name"]).sha256

    edit_json(folder / STATEMENT, restate)


def retag(version: Version) -> None:
    statement_hash = digest_file(version.folder / STATEMENT).sha256
    version.client.set_model_version_tag(MODEL, "1", "statement_hash", statement_hash)


def execute(version: Version, statement: str) -> None:
    with sqlite3.connect(version.root / "mlflow.db") as database:
        changed = database.execute(statement).rowcount
    database.close()
    assert changed


def resigned_by_stranger(version: Version) -> None:
    edit(version.folder / "README.md", "Limits", "No limits")
    rewrite_statement(version.folder)
    retag(version)
    (version.folder / SIGNATURE).unlink()
    sign_folder(version.folder, signing_of(Path(version.signing.key or "").parent, "stranger"))


def swap(folder: Path, first: str, second: str) -> None:
    (folder / first).rename(folder / "swapped")
    (folder / second).rename(folder / first)
    (folder / "swapped").rename(folder / second)


def replace_by_link(path: Path) -> None:
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def other_version_in_place(version: Version) -> None:
    shutil.rmtree(version.folder)
    shutil.copytree(version.other, version.folder)


def other_weights(version: Version) -> None:
    for name in ("model.safetensors", "config.json", "pruning_plan.json"):
        overwrite(version.folder / name, (version.other / name).read_bytes())
    rewrite_statement(version.folder)
    retag(version)


def other_plan(version: Version) -> None:
    overwrite(version.folder / "pruning_plan.json", (version.other / "pruning_plan.json").read_bytes())
    rewrite_statement(version.folder)
    retag(version)


def forge(name: str, old: str, new: str) -> Change:
    """A change of a file, followed by all that makes it look right without the key."""

    def change(version: Version) -> None:
        edit(version.folder / name, old, new)
        rewrite_statement(version.folder)
        retag(version)

    return change


def new_alias(alias: str, number: str) -> Change:
    return lambda v: v.client.set_registered_model_alias(MODEL, alias, number)


def new_tag(key: str, value: str) -> Change:
    return lambda v: v.client.set_model_version_tag(MODEL, "1", key, value)


def drop_subject(version: Version) -> None:
    (version.folder / "ragged.py").unlink()
    keep = [entry for entry in _subject(version) if entry["name"] != "ragged.py"]
    edit_json(version.folder / STATEMENT, lambda content: content.update(subject=keep))
    retag(version)


def subject_outside(version: Version) -> None:
    outside = version.root / "outside"
    outside.write_text("outside", encoding="utf-8")
    entry = {"name": "../outside", "digest": {"sha256": digest_file(outside).sha256}}
    edit_json(version.folder / STATEMENT, lambda content: content["subject"].append(entry))
    retag(version)


def _subject(version: Version) -> list[dict[str, Any]]:
    subject: list[dict[str, Any]] = json.loads((version.folder / STATEMENT).read_text(encoding="utf-8"))["subject"]
    return subject


def edit_record(version: Version) -> None:
    record = version.client.get_model_version(LOG, "1").tags["record"]
    version.client.set_model_version_tag(LOG, "1", "record", record.replace("ann", "eve"))


def download_mark(version: Version) -> None:
    (version.folder / "registered_model_meta").write_text("model_name: tiny\nmodel_version: '2'\n", encoding="utf-8")


CHANGES: dict[str, tuple[Change, str]] = {
    "swapped files": (
        lambda v: swap(v.folder, "tokenizer_config.json", "generation_config.json"),
        r"^tokenizer_config\.json was changed",
    ),
    "extra file": (
        lambda v: overwrite(v.folder / "notes.txt", "x"),
        r"^notes\.txt is an extra file",
    ),
    "extra pickle": (lambda v: overwrite(v.folder / "pytorch_model.bin", "x"), r"^pytorch_model\.bin is an extra"),
    "extra file that git and signatures ignore": (
        lambda v: overwrite(v.folder / ".gitignore", "x"),
        r"^\.gitignore is an extra",
    ),
    "extra evidence": (lambda v: overwrite(v.folder / "provenance/x.json", "{}"), r"^provenance/x\.json is an extra"),
    "extra weights": (
        lambda v: shutil.copy(v.folder / "model.safetensors", v.folder / "model-00002.safetensors"),
        r"^model-00002\.safetensors is an extra",
    ),
    "missing file": (lambda v: (v.folder / "ragged.py").unlink(), r"^ragged\.py is missing"),
    "missing weights": (lambda v: (v.folder / "model.safetensors").unlink(), r"^model\.safetensors is missing"),
    "missing statement": (lambda v: (v.folder / STATEMENT).unlink(), r"statement\.json is missing"),
    "truncated weights": (
        lambda v: overwrite(v.folder / "model.safetensors", (v.folder / "model.safetensors").read_bytes()[:-8]),
        r"^model\.safetensors was changed",
    ),
    "link to the same content": (
        lambda v: replace_by_link(v.folder / "config.json"),
        r"^config\.json is a link to ",
    ),
    "linked folder": (lambda v: replace_by_link(v.folder / "serving"), r"^serving is a link to "),
    "pipe": (lambda v: os.mkfifo(v.folder / "pipe"), r"^pipe is neither a file nor a folder"),
    "metric logged anew": (
        lambda v: v.client.log_metric(v.registered.run_id, "perplexity", 1.5),
        r"metric perplexity is 1\.5",
    ),
    "metric edited in the database": (
        lambda v: execute(v, "UPDATE latest_metrics SET value = 9000.0 WHERE key = 'tokens_per_second'"),
        r"metric tokens_per_second is 9000",
    ),
    "metric deleted": (
        lambda v: execute(v, "DELETE FROM latest_metrics WHERE key = 'dense_perplexity'"),
        r"metric dense_perplexity is missing",
    ),
    "parameter of the run edited": (
        lambda v: execute(v, "UPDATE params SET value = '4096' WHERE key = 'calibration.samples'"),
        r"parameter calibration\.samples is 4096",
    ),
    "run of the version edited": (
        lambda v: execute(v, "UPDATE model_versions SET run_id = 'x' WHERE name = 'tiny'"),
        r"MLflow: run is x",
    ),
    "tag of a figure": (new_tag("perplexity", "1.5"), r"tag perplexity is 1\.5"),
    "tag of a hash": (new_tag("content_hash", "0" * 32 + ".dir"), r"tag content_hash is 0000"),
    "tag of the commit": (new_tag("git_commit", "0" * 40), r"tag git_commit is 0000"),
    "tag of the statement": (new_tag("statement_hash", "0" * 64), r"statement\.json: its SHA-256"),
    "tag deleted": (
        lambda v: v.client.delete_model_version_tag(MODEL, "1", "budget"),
        r"tag budget is absent",
    ),
    "edited statement": (
        lambda v: edit(v.folder / STATEMENT, '"samples": 4', '"samples": 5'),
        r"statement\.json: its SHA-256",
    ),
    "edited statement, tag too": (forge(STATEMENT, '"git_dirty": "false"', '"git_dirty": "true"'), r"^model\.sig does"),
    "statement without a file, tag too": (drop_subject, r"^the checkpoint: DVC's hash is"),
    "statement with a path outside": (subject_outside, r"^\.\./outside is missing"),
    "statement with a key twice": (
        lambda v: edit(v.folder / STATEMENT, "{", '{"_type": "https://in-toto.io/Statement/v1",'),
        r"statement\.json cannot be read: .*twice",
    ),
    "card": (forge("README.md", "## Limits", "## No limits"), r"^model\.sig does not hold: .*README\.md"),
    "serving code": (forge("serving/numprune_serving.py", "Serves", "Steals"), r"^model\.sig does not hold"),
    "params.yaml": (forge(PARAMETERS, "samples: 4", "samples: 4000"), r"params\.yaml: calibration\.samples is 4000"),
    "dvc.lock": (forge(LOCK, "stages:", "stages: # mine"), r"^model\.sig does not hold: .*dvc\.lock"),
    "hash in dvc.lock": (
        lambda v: _rehash_in_lock(v, "artifacts/tiny/0.3/evaluation.json"),
        r"dvc\.lock: artifacts/tiny/0\.3/evaluation\.json is abab",
    ),
    "BOM": (
        lambda v: _forge_bom(v, lambda bom: bom["components"][-1].update(version="0.0.1")),
        r"bom\.cdx\.json: package/\S+ is 0\.0\.1",
    ),
    "BOM against its schema": (
        lambda v: _forge_bom(v, lambda bom: bom.update(colour="red")),
        r"bom\.cdx\.json does not fit the schema",
    ),
    "evaluation": (forge("provenance/evaluation.json", "240.3", "140.3"), r"evaluation\.json: its MD5 is"),
    "plan of another budget": (other_plan, r"^the weights: 0\.\S+ is .*, but pruning_plan\.json"),
    "weights, configuration and plan of another budget": (other_weights, r"^the checkpoint: DVC's hash is"),
    "another budget with its own statement and signature": (
        other_version_in_place,
        r"statement\.json: its SHA-256 is .* the tag in MLflow",
    ),
    "signature of another version": (
        lambda v: overwrite(v.folder / SIGNATURE, (v.other / SIGNATURE).read_bytes()),
        r"^model\.sig does not hold",
    ),
    "signature removed": (lambda v: (v.folder / SIGNATURE).unlink(), r"^model\.sig is missing"),
    "signature of nonsense": (lambda v: overwrite(v.folder / SIGNATURE, "{}"), r"^model\.sig does not hold"),
    "signed by another key": (resigned_by_stranger, r"^model\.sig does not hold: Key mismatch"),
    "MLflow's mark of another version": (download_mark, r"^registered_model_meta is .* registry"),
    "champion forged": (new_alias("champion", "2"), r"^promotion log: .*champion points at version 2"),
    "champion removed": (
        lambda v: v.client.delete_registered_model_alias(MODEL, "champion"),
        r"^promotion log: .*champion points at nothing",
    ),
    "previous forged": (new_alias("previous", "2"), r"^promotion log: .*previous points at version 2"),
    "alias of another budget": (new_alias("ratio-0_5", "1"), r"alias ratio-0_5 points at version 1"),
    "promotion deleted": (lambda v: v.client.delete_model_version(LOG, "1"), r"^promotion log: record 1 is missing"),
    "promotion edited": (edit_record, r"^promotion log: record 1: its signature"),
}


def _rehash_in_lock(version: Version, path: str) -> None:
    text = (version.folder / LOCK).read_text(encoding="utf-8")
    overwrite(version.folder / LOCK, re.sub(rf"(path: {path}\n.*\n\s+md5: )\w+", rf"\g<1>{'ab' * 16}", text))
    rewrite_statement(version.folder)
    retag(version)


def _forge_bom(version: Version, change: Callable[[Any], object]) -> None:
    edit_json(version.folder / BOM, change)
    rewrite_statement(version.folder)
    retag(version)


def verified(version: Version) -> list[str]:
    # Those who check have the public key alone.
    signing = version.signing.model_copy(update={"key": None})
    return list(map(str, verify_version(version.client, version.registered, version.folder, signing)))


@pytest.mark.parametrize("kind", CHANGES)
def test_change_is_found(version: Version, kind: str) -> None:
    change, expected = CHANGES[kind]
    assert verified(version) == []
    change(version)
    found = verified(version)
    assert any(re.search(expected, line) for line in found), found


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_is_found(version: Version, name: str) -> None:
    path = version.folder / name
    flip(path, path.stat().st_size // 2)
    found = verified(version)
    assert any(name in line for line in found), found


def test_list_of_kinds_of_files_is_whole(version: Version) -> None:
    assert {path.relative_to(version.folder).as_posix() for path in version.folder.rglob("*") if path.is_file()} == {
        *FILES
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_bit_of_any_file(version: Version, name: str, place: float, bit: int) -> None:
    path = version.folder / name
    before = path.read_bytes()
    flip(path, int(place * len(before)), bit)
    try:
        assert verify_folder(version.folder, version.signing)
    finally:
        overwrite(path, before)


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        (PARAMETERS, "samples: 4", "samples: 4000", r"params\.yaml: calibration\.samples is 4000"),
        (PARAMETERS, "preset: best", "preset: paper", r"params\.yaml: recipe\S* is .*dvc\.lock"),
        ("config.json", '"hidden_act": "silu"', '"hidden_act": "relu"', r"the checkpoint: DVC's hash"),
        ("pruning_plan.json", '"achieved_ratio": 0.', '"achieved_ratio": 0.9', r"pruning_plan\.json: achieved_ratio"),
        ("provenance/evaluation.json", "240.3", "140.3", r"evaluation\.json: its MD5"),
        ("provenance/dense_evaluation.json", "235.5", "635.5", r"dense_evaluation\.json: its MD5"),
        (LOCK, "samples: 4", "samples: 8", r"params\.yaml: calibration"),
        (BOM, "pruned by numprune", "made by me, pruned by numprune", ""),
    ],
)
def test_rewritten_statement_needs_no_signature_to_be_found(
    unsigned: Path, name: str, old: str, new: str, expected: str
) -> None:
    assert verify_folder(unsigned, Signing()) == []
    edit(unsigned / name, old, new)
    rewrite_statement(unsigned)
    found = list(map(str, verify_folder(unsigned, Signing())))
    # Prose that nothing else depends on is protected by the statement's hash or a signature alone.
    assert any(re.search(expected, line) for line in found) if expected else not found, found
