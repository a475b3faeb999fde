"""The real application; signatures are made by MLflow's own code."""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from mlflow.webhooks.delivery import _generate_hmac_signature

from flows import webhook
from flows.webhook import FRESH_SECONDS, HUB_SECRET, MLFLOW_SECRET, create_app
from tasks.releases.ledger import Key
from tests.flows.conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {HUB_SECRET: "hub secret", MLFLOW_SECRET: "mlflow secret"}


@pytest.fixture
def emitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The events, in a checkout that watches the models `maker/Model-*`."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    content["watch"] |= {"sources": [{"kind": "hub", "owner": "maker", "pattern": "Model-*"}]}
    content["watch"] |= {"ledger": f"sqlite:///{tmp_path}/ledger.db"}
    Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    events: list[Any] = []
    monkeypatch.setattr(webhook, "release_found", events.append)
    monkeypatch.setattr(webhook, "version_registered", lambda *event: events.append(event))
    return events


@pytest.fixture
def client() -> TestClient:
    return TestClient(create_app(SECRETS))


def hub_payload(**repository: Any) -> dict[str, Any]:
    return {
        "event": {"action": "update", "scope": "repo.content"},
        "repo": {"type": "model", "name": "maker/Model-1.5B", "private": False, "headSha": COMMIT, **repository},
        "updatedRefs": [{"ref": "refs/heads/main", "oldSha": "1" * 40, "newSha": COMMIT}],
        "webhook": {"id": "1", "version": 3},
    }


def call_hub(client: TestClient, payload: Any, secret: str = "hub secret") -> int:
    return client.post("/hub", json=payload, headers={"X-Webhook-Secret": secret}).status_code


def test_commit_of_a_watched_model_is_announced_once(client: TestClient, emitted: list[Any]) -> None:
    assert call_hub(client, hub_payload()) == 200
    assert call_hub(client, hub_payload()) == 200
    (key,) = emitted
    assert isinstance(key, Key)
    assert (key.name, key.revision) == ("maker--Model-1_5B", COMMIT)


@pytest.mark.parametrize("secret", ["", "hub secre", "hub secret2", "mlflow secret", "schlüssel"])
def test_hub_without_the_secret(client: TestClient, emitted: list[Any], secret: str) -> None:
    headers = {"X-Webhook-Secret": secret.encode("latin-1")}
    assert client.post("/hub", json=hub_payload(), headers=headers).status_code == 401
    assert emitted == []


@pytest.mark.parametrize(
    "payload",
    [
        hub_payload(type="dataset"),
        hub_payload(name="maker/Other"),
        hub_payload(name="other/Model-1"),
        {**hub_payload(), "event": {"action": "create", "scope": "discussion"}},
        {**hub_payload(), "updatedRefs": [{"ref": "refs/pr/1", "newSha": COMMIT}]},
        {**hub_payload(), "updatedRefs": None},
        {},
    ],
)
def test_hub_calls_of_no_interest(client: TestClient, emitted: list[Any], payload: Any) -> None:
    assert call_hub(client, payload) == 200
    assert emitted == []


@pytest.mark.parametrize("payload", [hub_payload(headSha="12"), hub_payload(headSha=None), [], "text"])
def test_hub_calls_that_cannot_be_understood(client: TestClient, emitted: list[Any], payload: Any) -> None:
    assert call_hub(client, payload) == 422
    assert emitted == []


MLFLOW_PAYLOAD = {
    "entity": "model_version",
    "action": "created",
    "timestamp": "2026-01-01T00:00:00+00:00",
    "data": {"name": "model", "version": "3", "source": "models:/m-1", "run_id": "1", "tags": {"content_hash": "0"}},
}


def signed(
    payload: Any, *, delivery: str = "first", age: float = 0, secret: str = "mlflow secret"
) -> tuple[bytes, dict[str, str]]:
    body = json.dumps(payload)
    timestamp = str(int(time.time() - age))
    return body.encode(), {
        "X-MLflow-Delivery-Id": delivery,
        "X-MLflow-Timestamp": timestamp,
        "X-MLflow-Signature": _generate_hmac_signature(secret, delivery, timestamp, body),
    }


def call_mlflow(client: TestClient, body: bytes, headers: Mapping[str, str]) -> int:
    return client.post("/mlflow", content=body, headers=headers).status_code


def test_registered_version_goes_to_the_gate_once(client: TestClient, emitted: list[Any]) -> None:
    body, headers = signed(MLFLOW_PAYLOAD)
    assert call_mlflow(client, body, headers) == 200
    assert call_mlflow(client, body, headers) == 200
    assert emitted == [("model", 3)]
    assert call_mlflow(client, *signed(MLFLOW_PAYLOAD, delivery="second")) == 200
    assert emitted == [("model", 3)] * 2


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-MLflow-Signature", ""),
        ("X-MLflow-Signature", "v1,"),
        ("X-MLflow-Signature", "v1,no base64"),
        ("X-MLflow-Signature", "v1,c2lnbmF0dXJl"),
        ("X-MLflow-Delivery-Id", "other"),
        ("X-MLflow-Timestamp", "1"),
        ("X-MLflow-Timestamp", "now"),
    ],
)
def test_signature_covers_everything(client: TestClient, emitted: list[Any], header: str, value: str) -> None:
    body, headers = signed(MLFLOW_PAYLOAD)
    assert call_mlflow(client, body, {**headers, header: value}) == 401
    assert call_mlflow(client, body.replace(b'"3"', b'"4"'), headers) == 401
    assert emitted == []


def test_signature_of_another_version_or_secret(client: TestClient, emitted: list[Any]) -> None:
    body, headers = signed(MLFLOW_PAYLOAD)
    other = headers["X-MLflow-Signature"].replace("v1,", "v2,")
    assert call_mlflow(client, body, {**headers, "X-MLflow-Signature": other}) == 401
    assert call_mlflow(client, *signed(MLFLOW_PAYLOAD, secret="hub secret")) == 401
    assert emitted == []


@pytest.mark.parametrize("age", [FRESH_SECONDS + 10, -FRESH_SECONDS - 10])
def test_call_of_another_time(client: TestClient, emitted: list[Any], age: float) -> None:
    assert call_mlflow(client, *signed(MLFLOW_PAYLOAD, age=age)) == 401
    assert emitted == []


@pytest.mark.parametrize(
    "change", [{"entity": "prompt"}, {"action": "updated"}, {"data": {"name": "model", "version": "3", "tags": {}}}]
)
def test_mlflow_calls_of_no_interest(client: TestClient, emitted: list[Any], change: dict[str, Any]) -> None:
    assert call_mlflow(client, *signed({**MLFLOW_PAYLOAD, **change})) == 200
    assert emitted == []


def test_delivery_that_failed_may_come_again(emitted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(create_app(SECRETS), raise_server_exceptions=False)
    body, headers = signed(MLFLOW_PAYLOAD)
    with monkeypatch.context() as patch:
        patch.setattr(webhook, "version_registered", lambda *_: 1 / 0)
        assert call_mlflow(client, body, headers) == 500
    assert call_mlflow(client, body, headers) == 200
    assert emitted == [("model", 3)]


def test_hook_without_a_configured_secret_does_not_exist(emitted: list[Any]) -> None:
    client = TestClient(create_app({HUB_SECRET: ""}))
    assert call_hub(client, hub_payload(), "") == 404
    assert call_mlflow(client, *signed(MLFLOW_PAYLOAD, secret="")) == 404
    assert emitted == []


def test_large_calls_are_refused(client: TestClient, emitted: list[Any]) -> None:
    assert call_mlflow(client, b" " * 1_000_001, {}) == 413
    assert emitted == []
