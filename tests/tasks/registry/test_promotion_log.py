"""The log itself: many writers at once, and what a hand can do to it."""

import json
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from tasks.parameters import Registry, Signing
from tasks.publish import publish
from tasks.registry.connection import connect
from tasks.registry.promotion_log import LOG, append, champion, check_log, previous, read_promotions, settle_aliases
from tests.processes import FORKED
from tests.tasks.conftest import MODEL, Workspace

UNSIGNED = Signing()
OPTIONS = {"by": "ada", "reason": "because", "criteria": []}


def write(address: str, rounds: int, start: Barrier, effects: "SimpleQueue[int]") -> None:
    """Promotes versions in turn, whatever others do, and tells how often that had an effect."""
    client = connect(Registry(tracking_uri=address))
    start.wait(timeout=120)
    count = 0
    for _ in range(rounds):
        seen = read_promotions(client, MODEL)
        version = client.get_model_version(MODEL, "2" if champion(seen) == 1 else "1")
        count += append(client, UNSIGNED, seen=seen, version=version, action="promote", by="x", reason="", criteria=[])
        settle_aliases(client, MODEL)
    effects.put(count)


@pytest.fixture
def client(workspace: Workspace) -> MlflowClient:
    """Of a registry with two versions."""
    publish(MODEL, "0.2")
    workspace.make_results(seed=1)
    publish(MODEL, "0.2")
    return workspace.client


def record(client: MlflowClient, number: int, action: str = "promote") -> bool:
    seen = read_promotions(client, MODEL)
    version = client.get_model_version(MODEL, str(number))
    return append(client, UNSIGNED, seen=seen, version=version, action=action, **OPTIONS)


def test_many_processes_leave_one_story(client: MlflowClient) -> None:
    start, counts = FORKED.Barrier(2), FORKED.SimpleQueue()
    writers = [FORKED.Process(target=write, args=(client.tracking_uri, 6, start, counts)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    effects = counts.get() + counts.get()
    records = read_promotions(client, MODEL)
    assert sum(record.effective for record in records) == effects > 0
    effective = [record.version for record in records if record.effective]
    # Every effective record knew the one before it: the two versions take turns.
    assert effective == [1 + index % 2 for index in range(effects)]
    assert check_log(client, MODEL, UNSIGNED) == []


def test_decision_on_an_old_state_has_no_effect(client: MlflowClient) -> None:
    seen = read_promotions(client, MODEL)
    assert record(client, 1)
    version = client.get_model_version(MODEL, "2")
    assert not append(client, UNSIGNED, seen=seen, version=version, action="promote", **OPTIONS)
    assert champion(read_promotions(client, MODEL)) == 1


def test_rollback_of_a_rollback_goes_further_back(client: MlflowClient) -> None:
    for number, action in ((1, "promote"), (2, "promote"), (1, "promote"), (2, "rollback")):
        record(client, number, action)
    promotions = read_promotions(client, MODEL)
    assert (champion(promotions), previous(promotions)) == (2, 1)


def edit(client: MlflowClient, number: int, **changes: object) -> None:
    version = client.get_model_version(LOG, str(number))
    content = json.loads(version.tags["record"]) | changes
    client.set_model_version_tag(LOG, str(number), "record", json.dumps(content))


@pytest.mark.parametrize(
    ("tamper", "found"),
    [
        (lambda c: c.set_registered_model_alias(MODEL, "champion", "1"), "alias champion points at version 1"),
        (lambda c: c.set_registered_model_alias(MODEL, "previous", "2"), "alias previous points at version 2"),
        (lambda c: c.delete_registered_model_alias(MODEL, "champion"), "alias champion points at nothing"),
        (lambda c: edit(c, 1, by="somebody else"), "record 2 does not follow"),
        (lambda c: edit(c, 2, version=1), "record 2 promotes small/1 and names models:/small/2"),
        (lambda c: edit(c, 2, after="1"), "record 2 cannot be read"),
        (lambda c: edit(c, 2, extra=1), "record 2 cannot be read"),
        (lambda c: c.set_model_version_tag(LOG, "2", "record", "{"), "record 2 cannot be read"),
        (lambda c: c.delete_model_version(LOG, "1"), "record 1 is missing"),
        (
            lambda c: c.delete_model_version(LOG, "2"),
            "alias champion points at version 2; from the log follows version 1",
        ),
        (lambda c: record(c, 2, "rollback"), "record 3 is a rollback to version 2, which was not the champion before"),
        (
            lambda c: c.set_model_version_tag(MODEL, "2", "statement_hash", "0"),
            "version 2 is not the one that record 2",
        ),
        (lambda c: c.delete_model_version(MODEL, "1"), "version 1, which record 1 promoted, was deleted"),
    ],
)
def test_what_a_hand_changes_is_found(
    client: MlflowClient, tamper: Callable[[MlflowClient], object], found: str
) -> None:
    record(client, 1)
    record(client, 2)
    settle_aliases(client, MODEL)
    assert check_log(client, MODEL, UNSIGNED) == []
    tamper(client)
    assert any(found in problem for problem in check_log(client, MODEL, UNSIGNED)), check_log(client, MODEL, UNSIGNED)


def test_alias_without_any_promotion_is_found(client: MlflowClient) -> None:
    client.set_registered_model_alias(MODEL, "champion", "1")
    (problem,) = check_log(client, MODEL, UNSIGNED)
    assert "from the log follows nothing" in problem


def test_alias_that_was_never_right_is_left_for_a_person(client: MlflowClient) -> None:
    record(client, 1)
    settle_aliases(client, MODEL)
    client.set_registered_model_alias(MODEL, "champion", "2")
    settle_aliases(client, MODEL)
    assert int(client.get_registered_model(MODEL).aliases["champion"]) == 2


def test_somebody_else_who_sets_the_alias_first_is_no_error(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(client, 1)
    original = MlflowClient.set_registered_model_alias

    def set_too_late(*args: str) -> None:
        original(*args)
        raise MlflowException("UNIQUE constraint failed: registered_model_aliases", error_code=BAD_REQUEST)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", set_too_late)
    settle_aliases(client, MODEL)
    assert check_log(client, MODEL, UNSIGNED) == []


def test_alias_that_cannot_be_set_is_an_error(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    record(client, 1)

    def refuse(*_: str) -> None:
        raise MlflowException("no permission")

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", refuse)
    with pytest.raises(MlflowException, match="no permission"):
        settle_aliases(client, MODEL)


def test_deleted_champion_is_reported(client: MlflowClient) -> None:
    record(client, 1)
    client.delete_model_version(MODEL, "1")
    settle_aliases(client, MODEL)
    assert "version 1, which record 1 promoted, was deleted" in check_log(client, MODEL, UNSIGNED)


@pytest.mark.parametrize("forged", ["text", "key", "none"])
def test_signed_records(client: MlflowClient, tmp_path: Path, forged: str) -> None:
    signing, others = (make_keys(tmp_path, name) for name in ("ours", "others"))
    version = client.get_model_version(MODEL, "1")
    options = {"seen": [], "version": version, "action": "promote", **OPTIONS}
    assert append(client, {"text": signing, "key": others, "none": UNSIGNED}[forged], **options)
    settle_aliases(client, MODEL)
    if forged == "text":
        assert check_log(client, MODEL, signing) == []
        edit(client, 1, reason="another")
    (problem,) = check_log(client, MODEL, signing)
    assert problem == {"none": "record 1 is not signed"}.get(forged, "record 1: its signature does not hold")


def make_keys(folder: Path, name: str) -> Signing:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return Signing(key=str(private), public_key=str(public))
