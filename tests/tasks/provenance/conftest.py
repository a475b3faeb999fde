"""Versions as the pipeline leaves them: a tiny model really pruned, evidence, a signature, a registry on SQLite."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.entities.model_registry import ModelVersion

from tasks.dvc_lock import read_lock
from tasks.parameters import Registry, Signing, load_parameters
from tasks.provenance.build import Build
from tasks.provenance.evidence import write_evidence
from tasks.provenance.version_files import digest_file, dvc_folder_hash, read_digests, read_json
from tasks.publish import budget_alias
from tasks.registry.connection import connect
from tasks.registry.figures import figure_tags, metrics
from tasks.registry.promotion_log import append, read_promotions, settle_aliases
from tests.flows.conftest import save_tiny_model

ROOT = Path(__file__).parents[3]
MODEL = "tiny"
BUDGETS = ("0.3", "0.5")


@dataclass(frozen=True)
class Version:
    """A registered version that a test may change as it likes."""

    root: Path
    folder: Path
    other: Path
    """The folder of the version with the other budget."""
    client: MlflowClient
    signing: Signing

    @property
    def registered(self) -> ModelVersion:
        return self.client.get_model_version(MODEL, "1")


def make_keys(folder: Path, name: str, password: bytes | None = None) -> Signing:
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption),
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return Signing(key=str(private), public_key=str(public))


def prune(budget: str) -> None:
    """What the stages from calibrate to compensate do, by the library alone."""
    from numprune.architectures import all_groups
    from numprune.budget import parse_budget
    from numprune.calibration import draw_samples
    from numprune.checkpoint import fingerprint as model_fingerprint
    from numprune.checkpoint import load_model, load_shapes
    from numprune.plan import Source, make_plan
    from numprune.planning import choose_within
    from numprune.progress import track
    from numprune.pruning import apply_plan, capture_to
    from numprune.samples import fingerprint, save_samples
    from numprune.saving import save_pruned
    from numprune.statistics import Measured

    parameters = load_parameters()
    recipe, folder = parameters.recipe.resolve(), Path("models") / MODEL
    output = Path("artifacts") / MODEL / budget
    input_ids = draw_samples(parameters.calibration.data, str(folder), samples=4, length=32, seed=0)
    save_samples(input_ids, output.parent / "calibration.safetensors")
    dense = load_model(folder)
    groups = all_groups(dense)
    statistics = output.parent / "statistics"
    statistics.mkdir(exist_ok=True)
    for _ in capture_to(statistics, dense, input_ids, batch_size=4, device="cpu"):
        pass
    measured = Measured(statistics, input_ids, 4, dense.device)
    choice = choose_within(parse_budget(budget), dense, load_shapes(folder), recipe, measured, watch=track)
    source = Source(MODEL, None, model_fingerprint(folder), fingerprint(input_ids))
    plan = make_plan(groups, choice, budget, source=source, recipe=recipe)
    plan.save(output / "plan.json")
    for _ in apply_plan(dense, plan, measured, recovery=recipe.recovery, damping=recipe.damping):
        pass
    save_pruned(dense, folder, output / "checkpoint", plan, input_ids)
    _write_measurements(output, perplexity=240.0 + float(budget))


def _write_measurements(output: Path, *, perplexity: float) -> None:
    def cost(folder: Path, speed: float) -> dict[str, Any]:
        from numprune.checkpoint import load_model, weight_bytes

        parameters = load_model(folder).num_parameters()
        size = weight_bytes(folder)
        return {
            "parameters": parameters,
            "checkpoint_bytes": size,
            "peak_memory_bytes": 2 * size,
            "tokens_per_second": speed,
            "seconds": [0.5],
        }

    pruned, dense = cost(output / "checkpoint", 120.5), cost(Path("models") / MODEL, 100.25)
    protocol = {"dtype": "float32", "device": "cpu"}
    contents = {
        output / "evaluation.json": {
            "perplexity": perplexity,
            "bits_per_byte": 7.9,
            "parameters": pruned["parameters"],
            "perplexity_without_compensation": 260.0,
            "protocol": protocol,
        },
        output.parent / "dense/evaluation.json": {
            "perplexity": 235.5,
            "bits_per_byte": 7.8,
            "parameters": dense["parameters"],
            "protocol": protocol,
        },
        output / "benchmark.json": {"dense": dense, "pruned": pruned, "protocol": {"repeats": 1}},
    }
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")


def lock() -> None:
    """Writes the `dvc.lock` that DVC would."""
    base, model = f"artifacts/{MODEL}", f"models/{MODEL}"
    data = load_parameters().calibration.data
    content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    stages: dict[str, Any] = {
        f"calibrate@{MODEL}": (
            [data, model],
            [f"{base}/calibration.safetensors"],
            {"calibration": content["calibration"]},
        ),
        f"evaluate_dense@{MODEL}": ([model], [f"{base}/dense/evaluation.json"], {"evaluation": content["evaluation"]}),
    }
    for budget in BUDGETS:
        run = f"{base}/{budget}"
        checkpoint, plan = f"{run}/checkpoint", f"{run}/plan.json"
        stages |= {
            f"prune@{MODEL}-{budget}": (
                [f"{base}/calibration.safetensors", model],
                [plan],
                {"recipe": content["recipe"], "workload": content["workload"]},
            ),
            f"compensate@{MODEL}-{budget}": (
                [plan, f"{base}/calibration.safetensors", model],
                [checkpoint],
                {"recipe.preset": content["recipe"]["preset"]},
            ),
            f"evaluate@{MODEL}-{budget}": ([checkpoint, plan, model], [f"{run}/evaluation.json"], {}),
            f"benchmark@{MODEL}-{budget}": ([checkpoint, model], [f"{run}/benchmark.json"], {}),
        }
    document = {
        "schema": "2.0",
        "stages": {
            name: {
                "cmd": f"python -m tasks {name.partition('@')[0]}",
                "deps": [_entry(path) for path in dependencies],
                "params": {"params.yaml": parameters},
                "outs": [_entry(path) for path in outputs],
            }
            for name, (dependencies, outputs, parameters) in stages.items()
        },
    }
    Path("dvc.lock").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def _entry(path: str) -> dict[str, str]:
    if Path(path).is_file():
        md5 = digest_file(Path(path)).md5
    else:
        md5 = dvc_folder_hash({name: digests.md5 for name, digests in read_digests(Path(path))[0].items()})
    return {"path": path, "hash": "md5", "md5": md5}


def documents(budget: str) -> dict[str, Mapping[str, Any]]:
    return {name: read_json(path) for name, path in metric_files(budget).items()}


def metric_files(budget: str) -> dict[str, Path]:
    base = Path("artifacts") / MODEL
    files = {name: base / budget / name for name in ("plan.json", "evaluation.json", "benchmark.json")}
    return files | {"dense/evaluation.json": base / "dense/evaluation.json"}


def make_build(budget: str, run_id: str) -> Build:
    locked = {
        path: md5
        for stage in read_lock(Path("dvc.lock").read_text(encoding="utf-8")).values()
        for path, md5 in {**stage.dependencies, **stage.outputs}.items()
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    tags = {
        "model": MODEL,
        "budget": budget,
        "recipe": "best",
        "content_hash": locked[f"artifacts/{MODEL}/{budget}/checkpoint"],
        "source_hash": locked[f"models/{MODEL}"],
        "calibration_hash": locked[f"artifacts/{MODEL}/calibration.safetensors"],
        "plan_hash": locked[f"artifacts/{MODEL}/{budget}/plan.json"],
        "git_commit": commit,
        "git_dirty": "false",
        "source": MODEL,
        "revision": "",
        **figure_tags(documents(budget)),
    }
    return Build(MODEL, budget, "best", metric_files(budget), run_id, {"prefect_flow_run": "1f0c"}, tags)


def make_folder(folder: Path, budget: str) -> None:
    """A version folder without its evidence."""
    shutil.copytree(Path("artifacts") / MODEL / budget / "checkpoint", folder)
    (folder / "MLmodel").write_text("flavors: {}\n", encoding="utf-8")
    (folder / "serving").mkdir()
    (folder / "serving/numprune_serving.py").write_text('"""Serves."""\n', encoding="utf-8")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose stages have run, and the keys of two people; read only."""
    root = tmp_path_factory.mktemp("workspace")
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content |= {"models": [MODEL], "budgets": [float(budget) for budget in BUDGETS]}
    content["recipe"] |= {"planning_tokens": 64, "penalty": float("inf")}
    content["calibration"] |= {"data": "data/calibration.txt", "samples": 4, "length": 32}
    # A list of sections, which leave out what has a default.
    content["watch"]["sources"] = [{"kind": "folder", "path": "/releases"}]
    (root / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    (root / "data").mkdir()
    (root / "data/calibration.txt").write_text("The weights that stay take over the work. " * 40, encoding="utf-8")
    with contextlib.chdir(root):
        save_tiny_model(Path("models") / MODEL)
        card = "---\nlicense: apache-2.0\n---\n# tiny\n"
        (Path("models") / MODEL / "README.md").write_text(card, encoding="utf-8")
        for budget in BUDGETS:
            prune(budget)
        Path("models", MODEL, "README.md").rename("README.md")
        lock()
        Path("README.md").rename(Path("models") / MODEL / "README.md")
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        for command in (["init", "-q"], ["add", "params.yaml", "data"], ["commit", "-qm", "All"]):
            subprocess.run(["git", *identity, *command], check=True)
    make_keys(root, "key")
    make_keys(root, "stranger")
    return root


@pytest.fixture(scope="session")
def registry_template(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of two signed versions, of which the first is champion; each test gets a copy."""
    root = tmp_path_factory.mktemp("registry")
    client = connect(Registry(tracking_uri=f"sqlite:///{root}/mlflow.db"))
    signing = signing_of(workspace)
    client.create_registered_model(MODEL)
    experiment = client.create_experiment("numprune", artifact_location=(root / "artifacts").as_uri())
    hashes = []
    with contextlib.chdir(workspace):
        parameters = load_parameters().model_dump(mode="json", include={"calibration", "recipe", "evaluation"})
        for number, budget in enumerate(BUDGETS, start=1):
            run_id = client.create_run(experiment).info.run_id
            client.log_batch(
                run_id,
                metrics=[Metric(name, value, 1, 0) for name, value in metrics(documents(budget)).items()],
                params=[
                    Param(f"{section}.{name}", str(value))
                    for section, values in parameters.items()
                    for name, value in values.items()
                ],
            )
            client.set_terminated(run_id)
            folder = root / str(number)
            make_folder(folder, budget)
            build = make_build(budget, run_id)
            hashes.append(write_evidence(folder, build, signing))
            client.create_model_version(
                MODEL,
                source=folder.as_uri(),
                run_id=run_id,
                tags={**build.tags, "statement_hash": hashes[-1]},
            )
            client.set_registered_model_alias(MODEL, budget_alias(budget), str(number))
    client.set_registered_model_alias(MODEL, "candidate", "2")
    # Of several records, the first can be deleted and leaves a gap.
    for number, action in ((1, "promote"), (2, "promote"), (1, "rollback")):
        promoted = client.get_model_version(MODEL, str(number))
        seen = read_promotions(client, MODEL)
        append(client, signing, seen=seen, version=promoted, action=action, by="ann", reason="tried", criteria=[])
    settle_aliases(client, MODEL)
    return root


@pytest.fixture
def version(workspace: Path, registry_template: Path, tmp_path: Path) -> Version:
    """Version 1 in a registry of its own, signed and champion."""
    root = tmp_path / "registry"
    shutil.copytree(registry_template, root)
    with sqlite3.connect(root / "mlflow.db") as database:
        moved = (str(registry_template), str(root))
        database.execute("UPDATE model_versions SET source = replace(source, ?, ?)", moved)
        database.execute("UPDATE model_versions SET storage_location = replace(storage_location, ?, ?)", moved)
    database.close()
    client = connect(Registry(tracking_uri=f"sqlite:///{root}/mlflow.db"))
    return Version(root, root / "1", root / "2", client, signing_of(workspace))


@pytest.fixture
def unsigned(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A version folder without signature; the test runs in the workspace."""
    monkeypatch.chdir(workspace)
    folder = tmp_path / "unsigned"
    make_folder(folder, BUDGETS[0])
    write_evidence(folder, make_build(BUDGETS[0], "run"), Signing())
    return folder


def signing_of(workspace: Path, name: str = "key") -> Signing:
    return Signing(key=str(workspace / f"{name}.pem"), public_key=str(workspace / f"{name}.pub"))
