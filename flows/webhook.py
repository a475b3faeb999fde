"""Webhooks of the Hugging Face Hub and of MLflow, turned into the events that start flows.

    NUMPRUNE_HUB_SECRET=... NUMPRUNE_MLFLOW_SECRET=... python -m flows.webhook

It listens on this machine only; a reverse proxy with TLS stands before it. A call is believed if it carries the secret
(the Hub) or a signature made with it (MLflow), and a hook without a configured secret does not exist.
"""

import base64
import binascii
import fnmatch
import hashlib
import hmac
import json
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from flows.environment import prepare_environment

prepare_environment()

from fastapi import FastAPI, Request, Response  # noqa: E402
from starlette.concurrency import run_in_threadpool  # noqa: E402

from flows.events import release_found, version_registered  # noqa: E402
from numprune.errors import NumpruneError, reported  # noqa: E402
from tasks.parameters import HubSource, Watch, load_parameters  # noqa: E402
from tasks.releases.ledger import Key, Ledger, shaping_hash  # noqa: E402
from tasks.releases.sources import hub_release  # noqa: E402

HOST, PORT = "127.0.0.1", 4280
HUB_SECRET, MLFLOW_SECRET = "NUMPRUNE_HUB_SECRET", "NUMPRUNE_MLFLOW_SECRET"

# A signed call is older than this, or from the future, only if somebody kept it.
FRESH_SECONDS = 300

# Both senders' payloads are a few kilobytes.
MAX_BYTES = 1_000_000


class RefusedError(Exception):
    """The call is not believed, or cannot be understood."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Deliveries:
    """The calls accepted while they are fresh, so that none is accepted twice."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}
        self._lock = threading.Lock()

    def is_first(self, delivery: str) -> bool:
        """Whether this delivery was not accepted before; it is from now on."""
        now = time.time()
        with self._lock:
            # A time stamp may lie in the future by as much as it may lie in the past.
            self._seen = {name: until for name, until in self._seen.items() if until > now}
            return self._seen.setdefault(delivery, until := now + 2 * FRESH_SECONDS) == until

    def forget(self, delivery: str) -> None:
        """Lets a delivery that could not be handled come again."""
        with self._lock:
            self._seen.pop(delivery, None)


def create_app(environment: Mapping[str, str]) -> FastAPI:
    """The application; the secrets are those in `environment`."""
    app = FastAPI(openapi_url=None)
    deliveries = Deliveries()

    @app.exception_handler(RefusedError)
    async def refuse(_request: Request, error: RefusedError) -> Response:
        return Response(str(error), status_code=error.status)

    @app.post("/hub")
    async def hub(request: Request) -> Response:
        check_hub_secret(request.headers.get("X-Webhook-Secret", ""), _secret(environment, HUB_SECRET))
        payload = _parse(await _body(request))
        return Response(await run_in_threadpool(take_hub_event, payload))

    @app.post("/mlflow")
    async def mlflow(request: Request) -> Response:
        body = await _body(request)
        delivery = check_mlflow_signature(request.headers, body, _secret(environment, MLFLOW_SECRET), time.time())
        if not deliveries.is_first(delivery):
            return Response("was delivered before")
        try:
            return Response(await run_in_threadpool(take_mlflow_event, _parse(body)))
        except BaseException:
            deliveries.forget(delivery)
            raise

    return app


def check_hub_secret(given: str, secret: str) -> None:
    """The Hub sends the secret itself.

    Raises:
        RefusedError: If it is another.
    """
    if not hmac.compare_digest(given.encode(), secret.encode()):
        raise RefusedError(401, "wrong secret")


def check_mlflow_signature(headers: Mapping[str, str], body: bytes, secret: str, now: float) -> str:
    """MLflow signs number, time and content of a delivery.

    Args:
        headers: Of the call; names are taken without regard to case if the mapping does so.
        body: As received.
        secret: Shared with MLflow.
        now: Seconds since the epoch.

    Returns:
        The number of the delivery.

    Raises:
        RefusedError: If the signature is wrong, or the call is not of the last minutes.
    """
    delivery, timestamp = headers.get("X-MLflow-Delivery-Id", ""), headers.get("X-MLflow-Timestamp", "")
    expected = hmac.new(secret.encode(), f"{delivery}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    version, _, given = headers.get("X-MLflow-Signature", "").partition(",")
    try:
        matches = version == "v1" and hmac.compare_digest(base64.b64decode(given, validate=True), expected)
    except (binascii.Error, ValueError):
        matches = False
    if not matches or not delivery:
        raise RefusedError(401, "wrong signature")
    if not timestamp.isdecimal() or abs(now - int(timestamp)) > FRESH_SECONDS:
        raise RefusedError(401, "too old")
    return delivery


def take_hub_event(payload: Mapping[str, Any]) -> str:
    """Announces the commit that a watched model was brought to; says what it did."""
    repository = _mapping(payload, "repo")
    refs = payload.get("updatedRefs")
    branches = [ref.get("ref") for ref in refs if isinstance(ref, dict)] if isinstance(refs, list) else []
    of_model = repository.get("type") == "model" and _mapping(payload, "event").get("scope") == "repo.content"
    if not of_model or "refs/heads/main" not in branches:
        return "nothing to do: no new commit of a model"
    parameters = load_parameters()
    name = str(repository.get("name"))
    if not _is_watched(name, parameters.watch):
        return f"nothing to do: {name} is in no source of params.yaml"
    commit = str(repository.get("headSha"))
    try:
        found = hub_release(name, commit)
    except (ValueError, NumpruneError) as error:
        raise RefusedError(422, str(error)) from None
    ledger = Ledger.of(parameters.watch)
    shaping = shaping_hash(parameters)
    if not ledger.announce(found, shaping):
        return f"{name} at {commit} is known"
    release_found(Key(found.name, found.revision, shaping))
    return f"{name} at {commit} is announced"


def take_mlflow_event(payload: Mapping[str, Any]) -> str:
    """Passes a new version on to the gate; says what it did."""
    if (payload.get("entity"), payload.get("action")) != ("model_version", "created"):
        return "nothing to do: no new version"
    data = _mapping(payload, "data")
    name, version = data.get("name"), str(data.get("version"))
    if not isinstance(name, str) or not version.isdecimal():
        raise RefusedError(422, "the payload names no version")
    if "content_hash" not in _mapping(data, "tags"):
        return f"nothing to do: {name} version {version} is no compressed model"
    version_registered(name, int(version))
    return f"{name} version {version} goes to the gate"


def _is_watched(repository: str, watch: Watch) -> bool:
    owner, _, name = repository.partition("/")
    return any(
        source.owner == owner and fnmatch.fnmatchcase(name, source.pattern)
        for source in watch.sources
        if isinstance(source, HubSource)
    )


def _secret(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise RefusedError(404, "not configured")
    return environment[name]


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise RefusedError(413, "too large")
    return body


def _parse(body: bytes) -> dict[str, Any]:
    try:
        payload = json.loads(body)
    except ValueError:
        raise RefusedError(422, "no JSON") from None
    if not isinstance(payload, dict):
        raise RefusedError(422, "no JSON object")
    return payload


def _mapping(payload: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = payload.get(name)
    return value if isinstance(value, dict) else {}


def main() -> None:
    """Serves the hooks whose secrets are in the environment, until Ctrl-C."""
    import uvicorn

    with reported():
        load_parameters()
        if not {HUB_SECRET, MLFLOW_SECRET} & {name for name, value in os.environ.items() if value}:
            raise NumpruneError(f"Set {HUB_SECRET} or {MLFLOW_SECRET}: a hook without a secret is not served.")
    uvicorn.run(create_app(os.environ), host=HOST, port=PORT)


if __name__ == "__main__":
    main()
