"""Promotion and rollback on real MLflow, with races and crashes."""

import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from numprune.errors import NumpruneError
from tasks.parameters import Signing
from tasks.publish import publish
from tasks.registry import promotion_log, version_folder
from tasks.registry.promote import Decision, promote, rollback
from tasks.registry.promotion_log import LOG, check_log, read_promotions
from tests.tasks.conftest import MODEL, Workspace


@pytest.fixture
def versions(workspace: Workspace) -> Workspace:
    """Three versions, each faster than the one before."""
    for seed, speed in enumerate((11.0, 13.0, 15.0)):
        workspace.make_results(seed=seed, speed=speed)
        publish(MODEL, "0.2")
    return workspace


def state(client: MlflowClient) -> tuple[int | None, int | None]:
    aliases = {alias: int(number) for alias, number in client.get_registered_model(MODEL).aliases.items()}
    return aliases.get("champion"), aliases.get("previous")


def everything(client: MlflowClient) -> Any:
    models = client.search_registered_models()
    versions = client.search_model_versions()
    return (
        sorted((m.name, m.last_updated_timestamp, sorted(m.aliases.items())) for m in models),
        sorted((v.name, int(v.version), v.last_updated_timestamp, sorted(v.tags.items())) for v in versions),
    )


def failed(decision: Decision) -> list[str]:
    return [criterion.name for criterion in decision.criteria if not criterion.passed]


def test_promotions_and_the_way_back(versions: Workspace) -> None:
    client = versions.client
    first = promote(f"{MODEL}/1", by="ada", reason="the first")
    assert (first.outcome, first.champion, first.promoted) == ("accepted", None, True)
    assert state(client) == (1, None)
    promote(f"{MODEL}/2")
    assert promote(MODEL).version == 3  # The candidate.
    assert state(client) == (3, 2)
    rollback(MODEL, by="grace", reason="repeats itself")
    assert state(client) == (2, 1)
    rollback(MODEL)
    assert state(client) == (1, None)
    with pytest.raises(NumpruneError, match="nothing to go back to"):
        rollback(MODEL)
    promote(f"{MODEL}/3")
    assert state(client) == (3, 1)
    assert check_log(client, MODEL, Signing()) == []

    records = read_promotions(client, MODEL)
    assert [(r.action, r.version, r.replaced) for r in records] == [
        ("promote", 1, None),
        ("promote", 2, 1),
        ("promote", 3, 2),
        ("rollback", 2, 3),
        ("rollback", 1, 2),
        ("promote", 3, 1),
    ]
    assert (records[0].by, records[0].reason) == ("ada", "the first")
    assert records[0].at.endswith("+00:00")
    assert records[0].statement_hash == client.get_model_version(MODEL, "1").tags["statement_hash"]
    assert "perplexity ratio" in [criterion.name for criterion in records[0].criteria]
    assert records[1].by  # The login name.


def test_worse_candidate_is_refused_and_nothing_changes(versions: Workspace) -> None:
    promote(f"{MODEL}/3")
    before = everything(versions.client)
    decision = promote(f"{MODEL}/1")
    assert (decision.outcome, decision.promoted) == ("refused", False)
    assert failed(decision) == ["not dominated"]
    versions.edit_parameters("promotion", max_perplexity_ratio=1.01)
    assert failed(promote(f"{MODEL}/2")) == ["perplexity ratio", "not dominated"]
    assert everything(versions.client) == before


def test_dry_run_changes_nothing(versions: Workspace) -> None:
    before = everything(versions.client)
    decision = promote(MODEL, dry_run=True)
    assert (decision.outcome, decision.promoted) == ("accepted", False)
    assert everything(versions.client) == before


def test_champion_is_not_promoted_again(versions: Workspace) -> None:
    promote(MODEL)
    before = everything(versions.client)
    assert promote(MODEL).outcome == "unchanged"
    assert everything(versions.client) == before


def test_changed_file_is_refused(versions: Workspace) -> None:
    client = versions.client
    folder = version_folder.local_folder(client, client.get_model_version(MODEL, "3"), Path("unused"))
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(content + b"\n")
    decision = promote(MODEL)
    assert failed(decision) == ["verified"]
    assert "config.json" in decision.criteria[0].why
    assert state(client) == (None, None)


def test_signature_can_be_required(versions: Workspace) -> None:
    versions.edit_parameters("promotion", signed=True)
    assert "signature" in failed(promote(MODEL))


def test_rollback_to_a_changed_version_is_refused(versions: Workspace) -> None:
    client = versions.client
    promote(f"{MODEL}/1")
    promote(f"{MODEL}/2")
    folder = version_folder.local_folder(client, client.get_model_version(MODEL, "1"), Path("unused"))
    (folder / "ragged.py").unlink()
    decision = rollback(MODEL)
    assert (decision.outcome, failed(decision)) == ("refused", ["verified"])
    assert state(client) == (2, 1)


@pytest.mark.parametrize("candidates", [("1", "2"), ("3", "3")])
def test_of_two_at_once_one_wins(
    versions: Workspace, monkeypatch: pytest.MonkeyPatch, candidates: tuple[str, str]
) -> None:
    both_have_looked = threading.Barrier(2, timeout=60)
    create = MlflowClient.create_model_version

    def create_together(self: MlflowClient, name: str, *args: Any, **kwargs: Any) -> Any:
        both_have_looked.wait()
        return create(self, name, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", create_together)
    decisions: dict[int, Decision] = {}
    threads = [
        threading.Thread(target=lambda i=i, number=number: decisions.update({i: promote(f"{MODEL}/{number}")}))
        for i, number in enumerate(candidates)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [decision for decision in decisions.values() if decision.promoted]
    (loser,) = [decision for decision in decisions.values() if not decision.promoted]
    assert loser.outcome == ("unchanged" if loser.version == winner.version else "refused")
    client = versions.client
    assert state(client) == (winner.version, None)
    records = read_promotions(client, MODEL)
    assert [record.effective for record in records] == [True, False]
    assert check_log(client, MODEL, Signing()) == []
    monkeypatch.undo()


def test_another_models_promotion_in_between_is_no_obstacle(
    versions: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = versions.client
    create = MlflowClient.create_model_version
    others = ["another"]
    client.create_registered_model("another")
    model_id = client.get_model_version(MODEL, "1").source
    other = client.create_model_version("another", source=model_id)

    def create_after_another(self: MlflowClient, name: str, *args: Any, **kwargs: Any) -> Any:
        if others:
            others.pop()
            options = {"by": "x", "reason": "", "criteria": []}
            assert promotion_log.append(client, Signing(), seen=[], version=other, action="promote", **options)
        return create(self, name, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", create_after_another)
    assert promote(MODEL).promoted
    assert [(r.number, r.effective) for r in read_promotions(client, MODEL)] == [(2, False), (3, True)]
    assert check_log(client, MODEL, Signing()) == []


@pytest.mark.parametrize(
    ("step", "moment"),
    [
        ("create_registered_model", "after"),
        ("create_model_version", "before"),
        ("create_model_version", "after"),
        ("set_registered_model_alias", "before"),
        ("set_registered_model_alias", "after"),
    ],
)
def test_crash_is_mended_by_the_next_command(
    versions: Workspace, monkeypatch: pytest.MonkeyPatch, step: str, moment: str
) -> None:
    client = versions.client
    if step != "create_registered_model":
        promote(f"{MODEL}/1")
    original = getattr(MlflowClient, step)

    def crash(*args: Any, **kwargs: Any) -> Any:
        if moment == "after":
            original(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, crash)
        with pytest.raises(KeyboardInterrupt):
            promote(f"{MODEL}/2")
    promote(f"{MODEL}/2")
    assert state(client) == (2, None if step == "create_registered_model" else 1)
    assert check_log(client, MODEL, Signing()) == []


def test_crash_of_a_rollback_is_mended(versions: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(f"{MODEL}/1")
    promote(f"{MODEL}/2")
    with monkeypatch.context() as patch:
        patch.setattr("tasks.registry.promote.settle_aliases", lambda *_: None)
        rollback(MODEL)
    assert state(versions.client) == (2, 1)
    promote(f"{MODEL}/1")
    assert state(versions.client) == (1, None)


def test_without_params_the_policy_is_missing(client: MlflowClient, tmp_path: Path) -> None:
    del client
    (tmp_path / "params.yaml").unlink()
    with pytest.raises(NumpruneError, match=r"params\.yaml not found"):
        promote(MODEL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nobody", "no model 'nobody'"),
        (f"{MODEL}@champion", "no version with the alias 'champion'; its aliases are: candidate, ratio-0_2"),
        (f"{MODEL}/9", "no version 9"),
        (f"{MODEL}@@", "names no version"),
        ("a b", "names no version"),
    ],
)
def test_what_names_no_version(workspace: Workspace, text: str, message: str) -> None:
    publish(MODEL, "0.2")
    before = everything(workspace.client)
    with pytest.raises(NumpruneError, match=message):
        promote(text)
    assert everything(workspace.client) == before
    assert LOG not in [model.name for model in workspace.client.search_registered_models()]
