"""Real MLflow on SQLite; the pipeline's files are made up."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from numprune.errors import NumpruneError
from tasks.parameters import Registry, load_parameters
from tasks.publish import connect, publish, read_release

ROOT = Path(__file__).parents[2]
MODEL = "small"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Making the tables takes seconds; each test starts from a copy."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    connect(Registry(tracking_uri=f"sqlite:///{path}")).search_experiments()
    return path


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def make_results(budget: str, *, perplexity: float = 21.0, weights: str = "weights") -> None:
    """What the stages leave for one budget."""
    folder = Path("artifacts") / MODEL / budget
    cost = {"parameters": 80, "checkpoint_bytes": 160, "peak_memory_bytes": 200, "tokens_per_second": 9.5}
    write(folder / "plan.json", {"achieved_ratio": float(budget) - 0.001})
    write(folder / "evaluation.json", {"perplexity": perplexity, "perplexity_without_compensation": 30.0})
    write(folder / "benchmark.json", {"dense": cost, "pruned": cost, "protocol": {"device": "cpu"}})
    write(folder / "checkpoint/config.json", {})
    write(folder / "checkpoint/model.safetensors", weights)
    write(folder.parent / "dense/evaluation.json", {"perplexity": 20.0, "bits_per_byte": 1.1})
    write(folder.parent / "calibration.safetensors", "tokens")
    write(Path("models") / MODEL / "config.json", {})
    lock()


def lock() -> None:
    def entry(path: Path) -> dict[str, str]:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        content = b"".join(file.read_bytes() for file in files if file.is_file())
        return {"path": path.as_posix(), "hash": "md5", "md5": hashlib.md5(content).hexdigest()}

    base = Path("artifacts") / MODEL
    files = [path for pattern in ("*/*.json", "*/checkpoint", "*.safetensors") for path in base.glob(pattern)]
    stages = {"all": {"deps": [entry(Path("models") / MODEL)], "outs": [entry(path) for path in files]}}
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}), encoding="utf-8")


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> MlflowClient:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    Path("mlflow").mkdir()
    shutil.copy(empty_database, "mlflow/mlflow.db")
    # Absolute, because MLflow keeps connections by their address.
    content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    content["registry"]["tracking_uri"] = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    make_results("0.2")
    return connect(load_parameters().registry)


def everything(client: MlflowClient) -> Any:
    """All that a second call could have changed."""
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    versions = client.search_model_versions()
    return (
        sorted((run.info.run_id, run.info.status, run.info.end_time, sorted(run.data.tags.items())) for run in runs),
        sorted((v.name, v.version, v.last_updated_timestamp, sorted(v.tags.items())) for v in versions),
        sorted(
            (m.name, m.last_updated_timestamp, sorted(m.aliases.items())) for m in client.search_registered_models()
        ),
    )


def aliases(client: MlflowClient) -> dict[str, int]:
    return {alias: int(version) for alias, version in client.get_registered_model(MODEL).aliases.items()}


def test_published_version_is_found_by_alias(client: MlflowClient) -> None:
    from mlflow.artifacts import download_artifacts

    publication = publish(MODEL, "0.2")
    assert publication.is_new
    version = client.get_model_version_by_alias(MODEL, "candidate")
    release = read_release(MODEL, "0.2")
    assert release.tags.items() <= version.tags.items()
    assert {"git_commit", "git_dirty"} <= version.tags.keys()
    folder = Path(download_artifacts(f"models:/{MODEL}@candidate"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]

    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["perplexity"] == 21.0
    assert run.data.metrics["dense_perplexity"] == 20.0
    assert run.data.metrics["perplexity_without_compensation"] == 30.0
    assert run.data.metrics["dense_tokens_per_second"] == 9.5
    assert run.data.params["calibration.samples"] == "128"
    logged = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert logged == {"plan.json", "evaluation.json", "benchmark.json", "dense", "params.yaml", "dvc.lock"}


def test_second_publish_changes_nothing(client: MlflowClient) -> None:
    first = publish(MODEL, "0.2")
    before = everything(client)
    second = publish(MODEL, "0.2")
    assert (second.version, second.is_new) == (first.version, False)
    assert everything(client) == before


def test_every_budget_has_an_alias_and_the_newest_is_the_candidate(client: MlflowClient) -> None:
    make_results("0.5", weights="fewer")
    publish(MODEL, "0.2")
    publish(MODEL, "0.5")
    publish(MODEL, "0.2")
    assert aliases(client) == {"ratio-0_2": 1, "ratio-0_5": 2, "candidate": 2}


def test_earlier_content_is_found_again(client: MlflowClient) -> None:
    publish(MODEL, "0.2")
    make_results("0.2", weights="other weights")
    assert publish(MODEL, "0.2").version == 2
    make_results("0.2")
    assert publish(MODEL, "0.2").version == 1
    assert aliases(client) == {"ratio-0_2": 1, "candidate": 2}


def test_new_evaluation_of_the_same_checkpoint_is_a_run_but_no_version(client: MlflowClient) -> None:
    publish(MODEL, "0.2")
    make_results("0.2", perplexity=22.0)
    assert publish(MODEL, "0.2").version == 1
    (version,) = client.search_model_versions(f"name = '{MODEL}'")
    assert client.get_run(version.tags["evaluation_run"]).data.metrics["perplexity"] == 22.0


@pytest.mark.parametrize(
    "step",
    [
        "create_experiment",
        "create_run",
        "log_batch",
        "log_artifact",
        "create_logged_model",
        "log_model_artifacts",
        "finalize_logged_model",
        "create_registered_model",
        "create_model_version",
        "set_model_version_tag",
        "set_registered_model_alias",
        "set_terminated",
    ],
)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_crash_is_mended_by_the_next_call(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, step: str, moment: str
) -> None:
    original = getattr(MlflowClient, step)

    def crash(*args: Any, **kwargs: Any) -> Any:
        if moment == "after":
            original(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, crash)
        with pytest.raises(KeyboardInterrupt):
            publish(MODEL, "0.2")
    assert publish(MODEL, "0.2").version == 1
    assert aliases(client) == {"ratio-0_2": 1, "candidate": 1}
    (run,) = client.search_runs([client.get_experiment_by_name("numprune").experiment_id])
    assert run.info.status == "FINISHED"
    assert all(len(client.get_metric_history(run.info.run_id, name)) == 1 for name in run.data.metrics)
    before = everything(client)
    publish(MODEL, "0.2")
    assert everything(client) == before


def test_results_that_are_not_those_in_the_lock_are_refused(client: MlflowClient) -> None:
    write(Path("artifacts") / MODEL / "0.2/evaluation.json", {"perplexity": 1.0})
    with pytest.raises(NumpruneError, match=r"evaluation\.json .* run `dvc repro` first"):
        publish(MODEL, "0.2")
    assert client.search_registered_models() == []


@pytest.mark.usefixtures("client")
def test_stage_that_has_not_run() -> None:
    with pytest.raises(NumpruneError, match=r"0\.7/plan\.json is missing"):
        publish(MODEL, "0.7")
