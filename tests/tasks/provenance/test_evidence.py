import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from numprune.errors import NumpruneError
from numprune.plan import PruningPlan
from tasks.dvc_lock import LockedStage
from tasks.parameters import Signing, load_parameters
from tasks.provenance import consistency
from tasks.provenance.bom import bom_mistakes, make_bom
from tasks.provenance.card import make_card
from tasks.provenance.evidence import write_evidence
from tasks.provenance.statement import parse_statement, predicate
from tasks.provenance.verify import verify_folder, verify_version
from tasks.provenance.version_files import BOM, STATEMENT, digest_file
from tasks.registry.figures import metrics
from tests.tasks.provenance.conftest import BUDGETS, MODEL, Version, make_build, make_folder


def test_untouched_version_verifies(version: Version) -> None:
    found = verify_version(version.client, version.registered, version.folder, version.signing, signature_required=True)
    assert list(map(str, found)) == []


def test_unsigned_folder_verifies_unless_a_signature_is_required(unsigned: Path) -> None:
    assert verify_folder(unsigned, Signing()) == []
    (missing,) = verify_folder(unsigned, Signing(), signature_required=True)
    assert missing.where == "model.sig"


def test_signature_without_public_key_counts_only_where_one_is_required(version: Version) -> None:
    assert verify_folder(version.folder, Signing()) == []
    (unchecked,) = verify_folder(version.folder, Signing(), signature_required=True)
    assert "signing.public_key is not set" in str(unchecked)


def test_mark_of_mlflows_download_is_no_disagreement(version: Version) -> None:
    mark = version.folder / "registered_model_meta"
    mark.write_text("model_name: tiny\nmodel_version: '1'\n", encoding="utf-8")
    assert verify_version(version.client, version.registered, version.folder, version.signing) == []
    mark.write_text("model_name: tiny\nmodel_version: '1'\nmore: 1\n", encoding="utf-8")
    assert any("registered_model_meta" in str(found) for found in verify_folder(version.folder, version.signing))


def test_statement_says_where_everything_comes_from(version: Version, workspace: Path) -> None:
    statement = parse_statement((version.folder / STATEMENT).read_text(encoding="utf-8"))
    listed = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    there = [path for path in version.folder.rglob("*") if path.is_file()]
    names = {path.relative_to(version.folder).as_posix() for path in there} - {STATEMENT, "model.sig"}
    assert listed == {name: digest_file(version.folder / name).sha256 for name in names}
    definition = statement["predicate"]["buildDefinition"]
    known = {entry["name"]: entry for entry in definition["resolvedDependencies"]}
    weights = digest_file(workspace / "models" / MODEL / "model.safetensors")
    assert known["source/model.safetensors"]["digest"] == {"sha256": weights.sha256, "md5": weights.md5}
    assert known["code"]["digest"] == {"gitCommit": version.registered.tags["git_commit"]}
    assert definition["externalParameters"]["parameters"]["recipe"]["penalty"] == "inf"
    assert definition["internalParameters"]["environment"]["threads"] >= 1
    made = {entry["name"]: entry["digest"] for entry in statement["predicate"]["runDetails"]["byproducts"]}
    assert made[f"artifacts/{MODEL}/{BUDGETS[0]}/checkpoint"] == {"dvcFolder": version.registered.tags["content_hash"]}
    assert f"artifacts/{MODEL}/{BUDGETS[1]}/checkpoint" not in made


def test_statement_fits_the_schemas_of_in_toto_and_slsa(version: Version) -> None:
    text = (version.folder / STATEMENT).read_text(encoding="utf-8")
    for wrong in (
        text.replace("in-toto.io/Statement/v1", "in-toto.io/Statement/v2"),
        text.replace("https://slsa.dev/provenance/v1", "https://slsa.dev/provenance/v0"),
        text.replace('"finishedOn": "', '"finishedOn": "on '),
        text.replace('"byproducts"', '"products"'),
        text[:-10],
        "[]",
    ):
        with pytest.raises(NumpruneError, match="no provenance statement"):
            parse_statement(wrong)


def test_bom_fits_its_schema_and_names_source_data_and_software(version: Version) -> None:
    text = (version.folder / BOM).read_text(encoding="utf-8")
    assert bom_mistakes(text) == []
    bom = json.loads(text)
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["modelCard"]["modelParameters"]["modelArchitecture"] == "RaggedLlamaForCausalLM"
    assert model["licenses"] == [{"license": {"name": "apache-2.0"}}]
    purls = {component.get("purl", "").partition("@")[0] for component in bom["components"]}
    assert {"pkg:pypi/torch", "pkg:pypi/transformers", "pkg:pypi/safetensors"} <= purls
    assert bom_mistakes(text.replace('"1.6"', '"1.5"')) == ["specVersion must be 1.6"]
    assert bom_mistakes(text.replace('"machine-learning-model"', '"model"'))


def test_model_of_the_hub_is_named_by_repository_and_commit(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    revision = "c" * 40
    download = {"downloads.tiny": {"repository": "owner/tiny", "revision": revision}}
    stages = {"download@tiny": LockedStage("download@tiny", {}, {"models/tiny": "0.dir"}, download)}
    source = PruningPlan.load(Path("artifacts/tiny/0.3/plan.json")).source
    provenance = predicate(make_build(BUDGETS[0], "run"), load_parameters(), stages, source, figures={}, signed=False)
    known = {entry["name"]: entry for entry in provenance["buildDefinition"]["resolvedDependencies"]}
    assert known["source"]["annotations"]["revision"] == revision
    address = f"https://huggingface.co/owner/tiny/resolve/{revision}/config.json"
    assert known["source/config.json"]["downloadLocation"] == address
    bom = make_bom(provenance, {}, {}, {}, None)
    assert bom["components"][0]["purl"] == f"pkg:huggingface/owner/tiny@{revision}"
    assert bom_mistakes(json.dumps(bom)) == []
    card = make_card(provenance, {"achieved_ratio": 0.3}, {}, None, {})
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/tiny"
    assert "license" not in card.split("---")[1]


def test_card_says_what_was_measured(version: Version) -> None:
    text = (version.folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == MODEL
    assert front["license"] == "apache-2.0"
    assert "| perplexity | 235.500 | 240.300 |" in text
    assert version.registered.tags["git_commit"] in text
    assert f'from_pretrained("{MODEL}-0.3", trust_remote_code=True)' in text


def test_nothing_that_is_there_is_written_into(unsigned: Path) -> None:
    before = {path: digest_file(path) for path in unsigned.rglob("*") if path.is_file()}
    with pytest.raises(NumpruneError, match="is there already"):
        write_evidence(unsigned, make_build(BUDGETS[0], "run"), Signing())
    assert {path: digest_file(path) for path in unsigned.rglob("*") if path.is_file()} == before


def test_checkpoint_that_is_not_the_one_in_the_lock_is_refused(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    make_folder(tmp_path / "version", BUDGETS[0])
    with pytest.raises(NumpruneError, match=r"do not belong together(.|\n)*the checkpoint: DVC's hash"):
        write_evidence(tmp_path / "version", make_build(BUDGETS[1], "run"), Signing())
    assert not (tmp_path / "version" / STATEMENT).exists()


@pytest.mark.parametrize("change", [{"a_later_figure": 1.0}, {"perplexity": None}])
def test_versions_outlive_the_figures_that_are_derived(
    unsigned: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, float | None]
) -> None:
    """Another release of the code may log more of the same measurements, or less."""

    def later(documents: dict[str, Any]) -> dict[str, float]:
        return {name: value for name, value in (metrics(documents) | change).items() if value is not None}

    monkeypatch.setattr(consistency, "metrics", later)
    assert verify_folder(unsigned, Signing()) == []
    monkeypatch.setattr(consistency, "metrics", lambda documents: metrics(documents) | {"perplexity": 1.0})
    assert any("figure perplexity" in str(found) for found in verify_folder(unsigned, Signing()))
