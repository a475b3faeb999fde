"""The servers of a team on one machine without containers: `python -m infra.servers --help`."""

import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.request import Request, urlopen

import typer

from infra.buckets import DVC_BUCKET, MLFLOW_BUCKET, create_buckets
from infra.mlflow_auth import write_auth_settings
from infra.postgres import Database, start_postgres
from infra.processes import HOST, Server, answers, check_port, free_port, program, start
from numprune.errors import NumpruneError, reported
from numprune.files import replace_on_success

POOL = "numprune"
ADMINISTRATOR = "admin"
DATABASES = ("prefect", "mlflow", "mlflow_auth", "ledger")
# Seconds to wait for each server: they start in ten, and in many more on a machine that has other work.
_PATIENCE = 180
_INSTALL = "install it with `make setup`, or `pip install 'numprune[team]'`"
_INSTALL_S3 = "install it with `pip install 'moto[server]'`"
_QUIET = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@dataclass(frozen=True)
class Ports:
    """Where the servers listen on 127.0.0.1; 0: on a port that is free."""

    prefect: int = 0
    mlflow: int = 0
    postgres: int = 0
    s3: int = 0


@dataclass(frozen=True)
class Servers:
    """Running servers and what a client needs to reach them."""

    folder: Path
    prefect: str
    """Address of Prefect's API."""
    mlflow: str
    """Address of MLflow, for `registry.tracking_uri`."""
    ledger: str
    """Database of the releases seen, for `NUMPRUNE_LEDGER`: the address may hold a password."""
    environment: Mapping[str, str]
    """Addresses and credentials, for the environment of every client."""


@contextmanager
def servers(
    folder: Path,
    *,
    postgres: bool = False,
    s3: bool = False,
    auth: bool = False,
    worker: bool = True,
    ports: Ports | None = None,
    root: Path | None = None,
) -> Iterator[Servers]:
    """Starts Prefect, MLflow and what they stand on, waits until they answer, and ends all of them afterwards.

    What they hold stays in the folder, and the next start goes on with it, except what lay in the S3 stand-in.

    Args:
        folder: For databases, files, logs and generated passwords.
        postgres: Databases in PostgreSQL, from the distribution's packages, rather than in SQLite.
        s3: MLflow's files and a bucket for DVC on moto's S3 server. It keeps everything in memory and checks no key:
            for tests and for trying out only.
        auth: Ask for user and password, both in Prefect and in MLflow.
        worker: Also start a worker that runs flows as processes of this machine, in the pool `numprune`.
        ports: Where they listen; None: anywhere.
        root: Working directory of the worker; None: the present one.

    Yields:
        Addresses, and the environment of clients.

    Raises:
        NumpruneError: If a program is missing, a port is taken, or a server does not start; the message says which.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    setup = _Setup(folder, ports or Ports(), _secrets(folder / "secrets.json"))
    with ExitStack() as stack:
        database = setup.start_postgres(stack) if postgres else None
        storage = setup.start_s3(stack) if s3 else {}
        # Both take seconds to import and to create their tables, so they start side by side.
        prefect, prefect_server = setup.start_prefect(stack, database, auth=auth)
        mlflow, mlflow_server = setup.start_mlflow(stack, database, storage, auth=auth)
        prefect_server.wait_until(lambda: answers(f"{prefect}/health"), timeout=_PATIENCE)
        mlflow_server.wait_until(lambda: answers(f"{mlflow}/health"), timeout=_PATIENCE)
        environment = {"PREFECT_API_URL": prefect, "MLFLOW_TRACKING_URI": mlflow, **storage}
        if auth:
            environment["PREFECT_API_AUTH_STRING"] = setup.auth_string
            environment["MLFLOW_TRACKING_USERNAME"] = ADMINISTRATOR
            environment["MLFLOW_TRACKING_PASSWORD"] = setup.secrets["administrator"]
        ledger = f"sqlite:///{folder}/ledger.db" if database is None else database.url("ledger", "postgresql+psycopg2")
        if database is not None:
            # It holds a password, which does not belong into params.yaml.
            environment["NUMPRUNE_LEDGER"] = ledger
        if worker:
            setup.start_worker(stack, environment, root or Path.cwd())
        yield Servers(folder, prefect, mlflow, ledger, environment)


def deploy(running: Servers, root: Path) -> None:
    """Deploys every flow of `prefect.yaml`.

    Args:
        running: Where to.
        root: The checkout, which holds `prefect.yaml`.

    Raises:
        NumpruneError: If Prefect refuses; the message holds what it says.
    """
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = {**_inherited(), **running.environment, "PREFECT_HOME": str(running.folder / "prefect")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NumpruneError(f"`prefect deploy --all` failed in {root}:\n{done.stdout}{done.stderr}")


@dataclass(frozen=True)
class _Setup:
    folder: Path
    ports: Ports
    secrets: Mapping[str, str]

    @property
    def auth_string(self) -> str:
        return f"{ADMINISTRATOR}:{self.secrets['administrator']}"

    def start_postgres(self, stack: ExitStack) -> Database:
        port = self.ports.postgres or free_port()
        server, database = start_postgres(self.folder / "postgres", port, self.secrets["postgres"], DATABASES)
        stack.callback(server.end)
        return database

    def start_s3(self, stack: ExitStack) -> dict[str, str]:
        port = self.ports.s3 or free_port()
        url = f"http://{HOST}:{port}"
        server = self._start(
            stack, "moto_server", [program("moto_server", _INSTALL_S3), "-H", HOST, "-p", str(port)], port, {}
        )
        server.wait_until(lambda: answers(f"{url}/moto-api/"), timeout=_PATIENCE)
        environment = {
            "AWS_ENDPOINT_URL_S3": url,
            "MLFLOW_S3_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "numprune",
            "AWS_SECRET_ACCESS_KEY": "of-no-meaning-to-moto",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        create_buckets(environment)
        return environment

    def start_prefect(self, stack: ExitStack, database: Database | None, *, auth: bool) -> tuple[str, Server]:
        port = self.ports.prefect or free_port()
        home = self.folder / "prefect"
        home.mkdir(exist_ok=True)
        sqlite = f"sqlite+aiosqlite:///{home}/prefect.db"
        url = sqlite if database is None else database.url("prefect", "postgresql+asyncpg")
        environment = {"PREFECT_HOME": str(home), "PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
        # The page in the browser asks the address that it was told.
        environment["PREFECT_SERVER_UI_API_URL"] = api = f"http://{HOST}:{port}/api"
        if auth:
            environment["PREFECT_SERVER_API_AUTH_STRING"] = self.auth_string
            environment["PREFECT_API_AUTH_STRING"] = self.auth_string
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
        return api, self._start(stack, "prefect", command, port, environment)

    def start_mlflow(
        self, stack: ExitStack, database: Database | None, storage: Mapping[str, str], *, auth: bool
    ) -> tuple[str, Server]:
        port = self.ports.mlflow or free_port()
        home = self.folder / "mlflow"
        home.mkdir(exist_ok=True)
        driver = "postgresql+psycopg2"
        # Addresses with passwords go through the environment: command lines are there for everybody to read.
        environment = {
            **storage,
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{home}/mlflow.db"
            if database is None
            else database.url("mlflow", driver),
            # The runner of its evaluation jobs, which nothing here uses, would add four processes.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            # Secrets of webhooks must be readable after a restart.
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": self.secrets["webhooks"],
        }
        files = f"s3://{MLFLOW_BUCKET}" if storage else str(home / "artifacts")
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
        command += ["--workers", "1", "--artifacts-destination", files]
        if auth:
            settings = home / "basic_auth.ini"
            users = f"sqlite:///{home}/auth.db" if database is None else database.url("mlflow_auth", driver)
            write_auth_settings(settings, users)
            environment["MLFLOW_AUTH_CONFIG_PATH"] = str(settings)
            environment["MLFLOW_AUTH_ADMIN_USERNAME"] = ADMINISTRATOR
            environment["MLFLOW_AUTH_ADMIN_PASSWORD"] = self.secrets["administrator"]
            environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = self.secrets["flask"]
            command += ["--app-name", "basic-auth"]
        return f"http://{HOST}:{port}", self._start(stack, "mlflow", command, port, environment)

    def start_worker(self, stack: ExitStack, environment: Mapping[str, str], root: Path) -> None:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
        # Of a bucket elsewhere, which DVC pushes to; the storage of this stack has keys of its own.
        given = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        bucket = {} if "AWS_ACCESS_KEY_ID" in environment else given
        own = {**bucket, **environment, "PREFECT_HOME": str(self.folder / "prefect")}
        server = self._start(stack, "worker", command, None, own, root=root, children_first=True)
        server.wait_until(lambda: _has_worker(environment), timeout=_PATIENCE)

    def _start(
        self,
        stack: ExitStack,
        name: str,
        command: list[str],
        port: int | None,
        environment: Mapping[str, str],
        *,
        root: Path | None = None,
        children_first: bool = False,
    ) -> Server:
        if port is not None:
            check_port(port, name)
        with _undivided():
            server = start(
                name,
                command,
                log=self.folder / f"{name}.log",
                environment={**_inherited(), **_QUIET, **environment},
                folder=root or self.folder,
                children_first=children_first,
            )
            stack.callback(server.end)
        return server


@contextmanager
def _undivided() -> Iterator[None]:
    """Lets a signal wait until it is written down what was started, and so has to be ended."""
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _inherited() -> dict[str, str]:
    """The present environment without what would lead these servers to others."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "AWS_"))}


def _secrets(path: Path) -> dict[str, str]:
    """Passwords and keys, made once for a folder."""
    if path.exists():
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        return found
    made = {name: secrets.token_urlsafe(24) for name in ("postgres", "administrator", "flask")}
    made["webhooks"] = urlsafe_b64encode(secrets.token_bytes(32)).decode()  # As Fernet wants it.
    _write_private(path, json.dumps(made, indent=2))
    return made


def _write_private(path: Path, text: str) -> None:
    with replace_on_success(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(text, encoding="utf-8")


def _has_worker(environment: Mapping[str, str]) -> bool:
    url = f"{environment['PREFECT_API_URL']}/work_pools/{POOL}/workers/filter"
    headers = {"Content-Type": "application/json"}
    if auth := environment.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {b64encode(auth.encode()).decode()}"
    body: dict[str, Any] = {"workers": {"status": {"any_": ["ONLINE"]}}}
    request = Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - The URL is one of ours.
    try:
        with urlopen(request, timeout=5) as answer:  # noqa: S310
            return bool(json.load(answer))
    except OSError:  # The pool is not there yet.
        return False


def main(
    folder: Annotated[Path, typer.Option(help="Where databases, files, logs and passwords are kept.")] = Path(
        ".numprune/servers"
    ),
    postgres: Annotated[bool, typer.Option(help="Databases in PostgreSQL rather than in SQLite.")] = False,
    s3: Annotated[bool, typer.Option(help="Files on moto's S3 server, in memory: for trying out only.")] = False,
    auth: Annotated[bool, typer.Option(help="Ask for user and password.")] = False,
    worker: Annotated[bool, typer.Option(help="Start a worker that runs flows on this machine.")] = True,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow.")] = 5000,
    postgres_port: Annotated[int, typer.Option(help="Port of PostgreSQL.")] = 5433,
    s3_port: Annotated[int, typer.Option(help="Port of the S3 server.")] = 9000,
) -> None:
    """Runs Prefect, a worker and MLflow on this machine until Ctrl-C; deploys prefect.yaml where there is one."""
    # What ends a service politely ends everything below it, too.
    signal.signal(signal.SIGTERM, _interrupt)
    ports = Ports(prefect_port, mlflow_port, postgres_port, s3_port)
    try:
        with servers(folder, postgres=postgres, s3=s3, auth=auth, worker=worker, ports=ports) as running:
            if Path("prefect.yaml").exists() and worker:
                deploy(running, Path.cwd())
            _say(running)
            threading.Event().wait()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _say(running: Servers) -> None:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in running.environment.items()]
    file = running.folder / "environment"
    _write_private(file, "\n".join([*lines, ""]))
    print(f"Prefect  {running.prefect.removesuffix('/api')}")
    print(f"MLflow   {running.mlflow}")
    if "AWS_ENDPOINT_URL_S3" in running.environment:
        print(
            f"S3       {running.environment['AWS_ENDPOINT_URL_S3']} (in memory; buckets {MLFLOW_BUCKET}, {DVC_BUCKET})"
        )
    print(f"Logs     {running.folder}/*.log")
    if len(lines) > 2:
        print(f"In every other terminal, because there are credentials to set:\n\n    source {file}\n")
    else:
        print("In every other terminal:\n\n    " + "\n    ".join(lines) + "\n")
    print("Ctrl-C ends all of them; what they hold stays.", flush=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    with reported():
        app()
