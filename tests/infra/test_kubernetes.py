"""What can be checked without a cluster; `helm install` checks the values against the charts' own schemas."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "infra" / "kubernetes"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
VALUES = ["prefect-server", "prefect-worker", "mlflow", "storage"]


def load(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value, path)
    else:
        yield path, node


@pytest.mark.parametrize("name", [*VALUES, "postgres"])
def test_secrets_are_named_and_not_written(name: str) -> None:
    for document in load(name):
        assert document.get("kind") != "Secret"
        for path, value in leaves(document):
            # A key of this name holds the name of a Secret, or of a key in one.
            if re.fullmatch(r"(?i)password|secretKey|accessKey|authString|adminPassword|connectionUrl", path[-1]):
                pytest.fail(f"{'.'.join(path)} is written down")
            assert not re.search(r"://[^/\s:]+:[^/\s@]+@", str(value)), f"{'.'.join(path)} holds a password"


def test_every_secret_is_explained() -> None:
    named = set()
    for name in [*VALUES, "postgres"]:
        for document in load(name):
            for path, value in leaves(document):
                if path[-1] == "existingSecret" or (
                    path[-1] == "name" and len(path) > 1 and re.search("(?i)secret$", path[-2])
                ):
                    named.add(value)
            named |= set(document.get("extraSecretNamesForEnvFrom", []))
    assert named >= {"prefect-auth", "prefect-database", "postgres-mlflow", "mlflow-admin", "storage-root"}
    assert not [secret for secret in named if f"generic {secret} " not in README]


def test_versions_are_exact() -> None:
    tags = {
        (name, *path): value
        for name in VALUES
        for document in load(name)
        for path, value in leaves(document)
        if path[-1] in {"tag", "prefectTag"}
    }
    assert len(tags) == 4
    for path, tag in tags.items():
        assert re.fullmatch(r"v?\d+\.\d+\.\d+(-[\w.-]+)?", tag), path
    for line in re.findall(r"helm upgrade --install [^\n\\]+(?:\\\n[^\n\\]+)*", README):
        assert "--version " in line, line


def test_charts_bring_no_database_of_their_own() -> None:
    (server,) = load("prefect-server")
    assert server["postgresql"]["enabled"] is False
    assert server["redis"]["enabled"] is False
    assert server["secret"]["create"] is False
    (mlflow,) = load("mlflow")
    assert {"postgresql", "mysql", "minio"}.isdisjoint(mlflow)


def test_each_job_gets_its_gpu_and_its_limits() -> None:
    (worker,) = load("prefect-worker")
    template = json.loads(worker["worker"]["config"]["baseJobTemplate"]["configuration"])
    variables = template["variables"]["properties"]
    placeholders = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    # Prefect passes on nothing that has no place in the configuration.
    assert placeholders == variables.keys()
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
    assert variables["gpus"]["default"] == 1
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_databases_are_those_of_the_other_ways_to_run() -> None:
    from infra.servers import DATABASES

    cluster, *databases = load("postgres")
    names = {cluster["spec"]["bootstrap"]["initdb"]["database"], *(one["spec"]["name"] for one in databases)}
    assert names == set(DATABASES)
    roles = {role["name"] for role in cluster["spec"]["managed"]["roles"]}
    assert {one["spec"]["owner"] for one in databases} <= roles
