import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from infra import postgres
from infra.buckets import DVC_BUCKET
from infra.processes import HOST, check_port, free_port, program, start
from infra.servers import Ports, deploy, servers
from numprune.errors import NumpruneError

ROOT = Path(__file__).parents[2]

# What a client of MLflow does, in a process of its own: it knows nothing but the environment.
MLFLOW_CLIENT = """
import json, pathlib, sys, mlflow
folder = pathlib.Path(sys.argv[1])
mlflow.set_experiment("numprune")
with mlflow.start_run() as run:
    mlflow.log_metric("perplexity", 16.5)
client = mlflow.MlflowClient()
model = client.create_logged_model(run.info.experiment_id, name="tiny", source_run_id=run.info.run_id)
client.log_model_artifacts(model.model_id, str(folder))
client.finalize_logged_model(model.model_id, "READY")
client.create_registered_model("tiny")
version = client.create_model_version("tiny", f"models:/{model.model_id}", run.info.run_id, model_id=model.model_id)
client.set_registered_model_alias("tiny", "champion", version.version)
back = pathlib.Path(mlflow.artifacts.download_artifacts("models:/tiny@champion"))
print(json.dumps({"version": version.version, "weights": (back / "model.safetensors").read_bytes().hex()}))
"""

FLOW = """
from pathlib import Path
from prefect import flow, task

@task
def add(a, b):
    return a + b

@flow
def addition(result: str):
    Path(result).write_text(str(add(1, 2)))
"""
DVC_CONFIG = f"""
[core]
    remote = team
    analytics = false
['remote "team"']
    url = s3://{DVC_BUCKET}/cache
"""
DEPLOYMENT = """
deployments:
  - name: test
    entrypoint: addition.py:addition
    work_pool: {name: numprune}
"""


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "AWS_"))}
    quiet = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**own, **quiet, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs_postgres() -> None:
    try:
        program("initdb", "")
        program("postgres", "")
    except NumpruneError as error:
        pytest.skip(f"PostgreSQL is not installed: {error}")


@pytest.mark.pipeline
def test_every_server_does_its_work_and_none_is_left(reachable_folder: Path, tmp_path: Path) -> None:
    needs_postgres()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with servers(reachable_folder / "servers", postgres=True, s3=True, auth=True, root=tmp_path) as running:
        environment = {**running.environment, "PREFECT_HOME": str(tmp_path / "prefect")}
        family = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        listening = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert listening == {HOST}
        passwords = json.loads((running.folder / "secrets.json").read_text(encoding="utf-8")).values()
        command_lines = " ".join(word for p in family for word in p.cmdline())
        assert not [password for password in passwords if password in command_lines]

        for url in (f"{running.mlflow}/api/2.0/mlflow/registered-models/search", f"{running.prefect}/flows/count"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(url, data=None if "mlflow" in url else b"{}")
            assert refused.value.code == 401

        model = tmp_path / "model"
        model.mkdir()
        weights = os.urandom(100_000)
        (model / "model.safetensors").write_bytes(weights)
        answer = json.loads(
            run([sys.executable, "-c", MLFLOW_CLIENT, str(model)], tmp_path, environment).splitlines()[-1]
        )
        assert answer == {"version": "1", "weights": weights.hex()}

        assert dvc_brings_back(tmp_path / "checkout", environment)

        (tmp_path / "addition.py").write_text(FLOW, encoding="utf-8")
        (tmp_path / "prefect.yaml").write_text(DEPLOYMENT, encoding="utf-8")
        deploy(running, tmp_path)
        result = tmp_path / "result"
        command = ["prefect", "deployment", "run", "addition/test", "--watch", "--param", f"result={result}"]
        run([sys.executable, "-m", *command], tmp_path, environment)
        assert result.read_text(encoding="utf-8") == "3"
    assert not [process for process in family if process.is_running()]


def dvc_brings_back(checkout: Path, environment: dict[str, str]) -> bool:
    checkout.mkdir()
    data = checkout / "data.bin"
    data.write_bytes(os.urandom(10_000))
    before = hashlib.sha256(data.read_bytes()).hexdigest()
    dvc = [sys.executable, "-m", "dvc"]
    (checkout / ".dvc").mkdir()
    (checkout / ".dvc" / "config").write_text(DVC_CONFIG, encoding="utf-8")
    for command in (
        ["git", "init", "-q"],
        [*dvc, "add", "-q", "data.bin"],
        [*dvc, "push", "-q"],
    ):
        run(command, checkout, environment)
    data.unlink()
    shutil.rmtree(checkout / ".dvc" / "cache")
    run([*dvc, "pull", "-q"], checkout, environment)
    return hashlib.sha256(data.read_bytes()).hexdigest() == before


def test_postgres_keeps_its_databases_and_asks_for_the_password(reachable_folder: Path) -> None:
    needs_postgres()
    import psycopg2

    folder = reachable_folder / "postgres"
    server, database = postgres.start_postgres(folder, free_port(), "right", ["ledger"])
    try:
        with psycopg2.connect(database.url("ledger")) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE releases (revision text)")
        connection.close()
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            psycopg2.connect(database.url("ledger").replace("right", "wrong"))
    finally:
        server.end()
    with pytest.raises(NumpruneError, match="made with another"):
        postgres.start_postgres(folder, free_port(), "wrong", [])
    server, database = postgres.start_postgres(folder, free_port(), "right", ["ledger", "second"])
    try:
        connection = psycopg2.connect(database.url("ledger"))
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM releases")
            assert cursor.fetchone() == (0,)
        connection.close()
        psycopg2.connect(database.url("second")).close()
    finally:
        server.end()
    assert server.process.returncode == 0


def test_a_folder_postgres_cannot_reach_is_said(tmp_path: Path) -> None:
    needs_postgres()
    if os.geteuid() != 0:
        pytest.skip("only root starts PostgreSQL as another user")
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    with pytest.raises(NumpruneError, match="cannot reach"):
        postgres.start_postgres(folder / "postgres", free_port(), "password", [])


def test_a_missing_program_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NumpruneError, match=r"initdb was not found: install PostgreSQL"):
        postgres.start_postgres(tmp_path, free_port(), "password", [])


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(NumpruneError, match=f"port {port} of {HOST}, meant for prefect, is taken"):
            check_port(port, "prefect")
        with (
            pytest.raises(NumpruneError, match="meant for prefect"),
            servers(tmp_path, ports=Ports(prefect=port)),
        ):
            pass


def test_passwords_are_made_once_and_for_their_owner_only(tmp_path: Path) -> None:
    from infra.servers import _secrets

    made = _secrets(tmp_path / "secrets.json")
    assert _secrets(tmp_path / "secrets.json") == made
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
    assert len(set(made.values())) == len(made)


def test_the_end_of_a_log_explains_a_server_that_ends(tmp_path: Path) -> None:
    server = start(
        "it", [sys.executable, "-c", "raise SystemExit('no such table')"], log=tmp_path / "log", environment={}
    )
    with pytest.raises(NumpruneError, match=r"(?s)it ended with code 1.*no such table"):
        server.wait_until(lambda: False, timeout=30)
    server.end()


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    server = start("it", ["sleep", "60"], log=tmp_path / "log", environment={"PATH": os.environ["PATH"]})
    try:
        with pytest.raises(NumpruneError, match=r"did not answer within 0.5 seconds"):
            server.wait_until(lambda: False, timeout=0.5)
    finally:
        server.end()
    assert server.process.returncode == -15


def test_end_reaches_what_is_deaf_and_what_has_a_session_of_its_own(tmp_path: Path) -> None:
    child = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    parent = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True).wait()"
    )
    log = tmp_path / "log"
    server = start("it", [sys.executable, "-c", parent], log=log, environment={}, grace_seconds=0.5)
    server.wait_until(lambda: "ready" in log.read_text(encoding="utf-8"), timeout=30)
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) == 1
    server.end()
    assert server.process.returncode == -9
    assert not family[0].is_running()


def test_what_a_worker_runs_can_tidy_up_before_the_worker_ends(tmp_path: Path) -> None:
    temporary = tmp_path / "half"
    child = (
        "import pathlib, time; p = pathlib.Path('half'); p.touch(); print('ready', flush=True)\n"
        "try:\n    time.sleep(60)\nfinally:\n    time.sleep(0.3); p.unlink()"
    )
    # As Prefect's worker does, this parent kills its child when it is asked to end.
    parent = (
        "import signal, subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True); "
        "signal.signal(signal.SIGTERM, lambda *_: (child.kill(), sys.exit(0))); signal.pause()"
    )
    log = tmp_path / "log"
    command = [sys.executable, "-c", parent]
    server = start("it", command, log=log, environment={}, folder=tmp_path, children_first=True)
    server.wait_until(lambda: "ready" in log.read_text(encoding="utf-8"), timeout=30)
    assert temporary.exists()
    server.end()
    assert server.process.poll() is not None
    assert not temporary.exists()


def test_a_signal_while_they_start_leaves_nothing(tmp_path: Path) -> None:
    ports = [f"--{name}-port={free_port()}" for name in ("prefect", "mlflow")]
    command = [sys.executable, "-m", "infra.servers", "--folder", str(tmp_path / "servers"), "--no-worker", *ports]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "servers" / "mlflow.log").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == "Stopped.\n"
    assert family
    assert not [one for one in family if one.is_running()]
