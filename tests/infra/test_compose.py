import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import postgres
from infra.processes import free_port, program
from numprune.errors import NumpruneError

INFRA = Path(__file__).parents[2] / "infra"
COMPOSE = INFRA / "compose.yaml"
_REFERENCE = re.compile(r"\$\{(?P<name>\w+)(?P<modifier>:?[?-][^}]*)?\}")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def example() -> dict[str, str]:
    lines = (INFRA / ".env.example").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_it_follows_the_compose_specification() -> None:
    # The package carries the specification's schema, so that this needs no network.
    command = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run([program(command[0], ""), *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_image_has_an_exact_version(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert re.search(r":v?\d+(\.\d+)+(-[\w.]+)?$", service["image"]), f"{name}: {service['image']}"


def test_versions_are_those_of_the_constraints(compose: dict[str, Any]) -> None:
    constraints = (INFRA.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in constraints if "==" in line)
    assert f":{pinned['prefect']}-" in compose["services"]["prefect-server"]["image"]
    assert compose["services"]["mlflow"]["image"].endswith(f":{pinned['mlflow']}")


def test_ports_are_open_on_this_machine_only(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert not [port for port in published if not port.startswith("127.0.0.1:")]
    assert all("network_mode" not in service for service in compose["services"].values())


def test_what_it_takes_from_the_environment_is_in_the_example(example: dict[str, str]) -> None:
    references = list(_REFERENCE.finditer(COMPOSE.read_text(encoding="utf-8")))
    assert {match["name"] for match in references} == example.keys() - {"COMPOSE_PROFILES"}
    for match in references:
        name, modifier = match["name"], match["modifier"] or ""
        # Either it must be set, or being empty is of no harm.
        assert modifier == f":?set {name} in infra/.env" or name in {"HF_TOKEN", "MLFLOW_ALLOWED_HOSTS"}, name


def test_no_password_has_a_default(compose: dict[str, Any], example: dict[str, str]) -> None:
    secret = re.compile(r"PASSWORD|SECRET|TOKEN|_KEY")
    assert not [name for name, value in example.items() if secret.search(name) and value]
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if secret.search(name) or ("://" in str(value) and "@" in str(value)):
                assert _REFERENCE.search(str(value)), f"{name} is written down"


def test_what_runs_on_is_watched_and_restarted(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if name == "buckets":
            continue
        assert service["restart"] == "unless-stopped"
        # Nobody waits for these, and Prefect itself shows whether they live.
        assert "healthcheck" in service or name in {"prefect-services", "worker", "worker-cpu"}, name


def test_everything_named_exists(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[needed]
        assert set(service.get("networks", [])) <= compose["networks"].keys()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (INFRA / source).is_file(), source
        if build := service.get("build"):
            assert (INFRA / build["context"] / build["dockerfile"]).is_file()


def test_the_gpu_is_given_to_one_worker(compose: dict[str, Any]) -> None:
    assert {name for name, service in compose["services"].items() if "deploy" in service} == {"worker"}
    (device,) = compose["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert compose["services"]["worker"]["profiles"] == ["gpu"]


@pytest.mark.parametrize("image", ["mlflow", "worker"])
def test_images(image: str) -> None:
    folder = INFRA / image
    lines = (folder / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    (base,) = (rest for word, rest in instructions if word == "FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)
    users = [rest for word, rest in instructions if word == "USER"]
    assert users
    assert not {"0", "root"} & set(users)
    assert "ADD" not in {word for word, _ in instructions}
    for word, rest in instructions:
        if word == "RUN" and "pip install" in rest:
            assert "--constraint" in rest
            assert "--no-cache-dir" in rest
        if word in {"ENV", "ARG"}:
            assert not re.search(r"PASSWORD|SECRET|TOKEN", rest)
    # Nothing goes in but what is named, so that no secret that lies in the checkout reaches the builder.
    rules = (folder / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert next(rule for rule in rules if not rule.startswith("#")) == "*"


@pytest.mark.parametrize("image", ["mlflow", "worker"])
def test_what_images_copy_exists_and_is_let_in(image: str) -> None:
    context = INFRA if image == "mlflow" else INFRA.parent
    ignore = (INFRA / image / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for line in (INFRA / image / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY "):
            *sources, _ = (word for word in line.split()[1:] if not word.startswith("--"))
            for source in sources:
                assert (context / source).exists()
                assert f"!{source.rstrip('/')}" in ignore


def test_scripts_are_correct_shell() -> None:
    for script in (INFRA / "databases.sh", INFRA / "mlflow" / "start.sh", INFRA / "worker" / "start.sh"):
        subprocess.run(
            [script.read_text(encoding="utf-8").splitlines()[0].removeprefix("#!"), "-n", script], check=True
        )


def test_each_database_has_an_owner_of_its_own(reachable_folder: Path) -> None:
    try:
        program("initdb", "")
        program("psql", "")
    except NumpruneError as error:
        pytest.skip(f"PostgreSQL is not installed: {error}")
    import psycopg2

    server, database = postgres.start_postgres(reachable_folder / "postgres", free_port(), "superuser", [])
    try:
        subprocess.run(
            [INFRA / "databases.sh"],
            env={
                "PATH": os.environ["PATH"],
                "PGHOST": "127.0.0.1",
                "PGPORT": str(database.port),
                "PGPASSWORD": "superuser",
                "PGDATABASE": "postgres",
                "POSTGRES_USER": "numprune",
                "PREFECT_DATABASE_PASSWORD": "of'prefect",
                "MLFLOW_DATABASE_PASSWORD": "of-mlflow",
                "LEDGER_DATABASE_PASSWORD": "of-ledger",
            },
            check=True,
        )
        where = {"host": "127.0.0.1", "port": database.port}
        for owner, password, name in (
            ("prefect", "of'prefect", "prefect"),
            ("mlflow", "of-mlflow", "mlflow"),
            ("mlflow", "of-mlflow", "mlflow_auth"),
            ("ledger", "of-ledger", "ledger"),
        ):
            connection = psycopg2.connect(user=owner, password=password, dbname=name, **where)
            with connection, connection.cursor() as cursor:
                cursor.execute("CREATE TABLE mine (id integer)")
            connection.close()
        with pytest.raises(psycopg2.OperationalError, match="permission denied"):
            psycopg2.connect(user="ledger", password="of-ledger", dbname="mlflow", **where)
    finally:
        server.end()
