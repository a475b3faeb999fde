"""The flows around the gate on a real Prefect server; gate and registry are stand-ins that say as they are told."""

import contextvars
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.promote import promote
from flows.verify import verify
from tasks.registry.connection import all_pages
from tests.flows.conftest import ROOT, Server

pytestmark = pytest.mark.pipeline

Install = Callable[..., None]


@pytest.fixture(autouse=True)
def _settings(prefect_server: Server) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: prefect_server.url}):
        yield


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    def put(name: str, **content: Any) -> None:
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    put("tasks.registry", __path__=[])
    put("tasks.provenance", __path__=[])
    return put


@pytest.fixture
def gate(install: Install) -> list[dict[str, Any]]:
    """What the gate was asked; it lets `good` through, refuses `bad`, and finds `late` overtaken the first time."""
    asked: list[dict[str, Any]] = []

    def decide(reference: str, *, by: str, reason: str, dry_run: bool = False) -> Any:
        asked.append({"reference": reference, "by": by, "reason": reason, "dry_run": dry_run})
        overtaken = reference.startswith("late") and len(asked) == 1
        passed = reference.startswith(("good", "late")) and not overtaken
        criterion = SimpleNamespace(name="perplexity ratio", value="1.05", limit="1.1", passed=passed, why="")
        outcome = "accepted" if passed else "refused"
        said = {"model": reference, "version": 3, "champion": None, "criteria": (criterion,), "outcome": outcome}
        return SimpleNamespace(**said, dry_run=dry_run, overtaken=overtaken)

    install("tasks.registry.promote", promote=decide)
    return asked


@pytest.fixture
def messages() -> Iterator[list[dict[str, Any]]]:
    """What the notification block `custom-webhook/team` sent."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    block = CustomWebhookNotificationBlock(
        name="team",
        url=f"http://127.0.0.1:{server.server_port}/",
        json_data={"subject": "{{subject}}", "body": "{{body}}"},
    )
    block.save("team", overwrite=True, _sync=True)
    yield received
    server.shutdown()
    server.server_close()


def test_version_that_passes(gate: list[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
    state = promote("good", notify="custom-webhook/team", return_state=True)
    assert (state.is_completed(), state.name) == (True, "Promoted")
    assert [(call["reference"], call["dry_run"]) for call in gate] == [("good@candidate", False)]
    (message,) = messages
    assert message["subject"] == "numprune: good@candidate promoted"
    assert "passed: perplexity ratio 1.05, limit 1.1" in message["body"]


def test_who_was_overtaken_looks_at_the_new_champion(gate: list[dict[str, Any]]) -> None:
    assert promote("late", return_state=True).name == "Promoted"
    assert [call["dry_run"] for call in gate] == [False, False]


def test_refusal_is_a_completed_run(gate: list[dict[str, Any]]) -> None:
    state = promote("bad/7", return_state=True)
    assert (state.is_completed(), state.name) == (True, "Refused")
    assert "FAILED: perplexity ratio" in str(state.message)
    assert [call["reference"] for call in gate] == ["bad/7"]


def test_block_that_does_not_exist_is_told_before_anything_changes(gate: list[dict[str, Any]]) -> None:
    state = promote("good", notify="custom-webhook/nobody", return_state=True)
    assert (state.is_failed(), state.name) == (True, "Rejected")
    assert "custom-webhook/nobody" in str(state.message)
    assert gate == []


def answer_the_question(answer: dict[str, Any]) -> None:
    paused = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])))
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while not (runs := client.read_flow_runs(flow_run_filter=paused)):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        client.resume_flow_run(runs[0].id, run_input=answer)


@pytest.mark.parametrize("agrees", [True, False])
def test_approval_by_a_person(gate: list[dict[str, Any]], agrees: bool) -> None:
    answer = {"approve": agrees, "by": "Ada", "reason": "Looked at it."}
    person = threading.Thread(target=contextvars.copy_context().run, args=(answer_the_question, answer))
    person.start()
    state = promote("good", approval=True, return_state=True)
    person.join()
    assert state.is_completed(), state
    assert state.name == ("Promoted" if agrees else "Declined")
    assert [call["dry_run"] for call in gate] == ([True, False] if agrees else [True])
    if agrees:
        assert (gate[1]["by"], gate[1]["reason"]) == ("Ada", "Looked at it.")


def test_nobody_is_asked_about_what_is_refused(gate: list[dict[str, Any]]) -> None:
    assert promote("bad", approval=True, return_state=True).name == "Refused"
    assert [call["dry_run"] for call in gate] == [True]


@pytest.fixture
def logged() -> dict[str, int]:
    """Champions by the log of promotions."""
    return {}


@pytest.fixture
def registry(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: dict[str, int]
) -> dict[str, list[str]]:
    """Models with and without a champion; the verification finds what stands in the result."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    client = MlflowClient(
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", registry_uri=f"sqlite:///{tmp_path}/mlflow.db"
    )
    for name in ("first", "second", "third"):
        client.create_registered_model(name)
        client.create_model_version(name, source=(tmp_path / name).as_uri())
        if name != "third":
            client.set_registered_model_alias(name, "champion", "1")
    found: dict[str, list[str]] = {}
    install("tasks.registry.connection", connect=lambda _: client, all_pages=all_pages)
    install(
        "tasks.registry.promotion_log",
        CHAMPION="champion",
        read_promotions=lambda _client, model: model,
        champion=logged.get,
    )
    install("tasks.registry.version_folder", local_folder=lambda _client, _version, target: target)
    install("tasks.provenance.verify", verify_version=lambda _c, version, *_a, **_k: found.get(version.name, []))
    return found


def test_champions_that_agree(registry: dict[str, list[str]]) -> None:
    registry["third"] = ["It is no champion, and nobody looks."]
    state = verify(return_state=True)
    assert state.is_completed(), state
    assert state.message == "2 champion(s) verified."


def test_champion_that_does_not_agree_is_told_loudly(
    registry: dict[str, list[str]], messages: list[dict[str, Any]]
) -> None:
    registry["first"] = ["model.safetensors: changed"]
    state = verify(notify="custom-webhook/team", return_state=True)
    assert state.is_failed()
    assert "first version 1:\n  model.safetensors: changed" in str(state.message)
    assert "second" not in str(state.message)
    (message,) = messages
    assert "model.safetensors: changed" in message["body"]


def test_champion_that_only_the_log_names_is_looked_at(registry: dict[str, list[str]], logged: dict[str, int]) -> None:
    logged["third"] = logged["first"] = 1
    registry["third"] = ["the alias champion is missing"]
    state = verify(return_state=True)
    assert state.is_failed()
    assert str(state.message) == "third version 1:\n  the alias champion is missing"
