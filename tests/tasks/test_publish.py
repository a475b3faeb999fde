"""Real MLflow on SQLite; checkpoints are really pruned, their figures are made up."""

import hashlib
import importlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from numprune.errors import NumpruneError
from tasks.publish import find_publication, git_state, publish, read_release
from tasks.registry import version_folder
from tests.tasks.conftest import MODEL, Workspace, weights_size, write

CHECKPOINT = Path("artifacts") / MODEL / "0.2/checkpoint"


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
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    shipped = {path.relative_to(CHECKPOINT).as_posix() for path in CHECKPOINT.rglob("*") if path.is_file()}
    assert files > shipped | {"MLmodel", "serving/numprune_serving.py", "provenance/statement.json"}
    assert all((folder / name).read_bytes() == (CHECKPOINT / name).read_bytes() for name in shipped)
    statement = (folder / "provenance/statement.json").read_bytes()
    assert version.tags["statement_hash"] == hashlib.sha256(statement).hexdigest()

    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["perplexity"] == 21.0
    assert run.data.metrics["dense_perplexity"] == 20.0
    assert run.data.metrics["perplexity_without_compensation"] == 30.0
    assert run.data.metrics["dense_tokens_per_second"] == 10.0
    assert run.data.metrics["speed_up"] == pytest.approx(1.1)
    assert run.data.params["calibration.samples"] == "128"
    logged = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert logged == {
        "plan.json",
        "lineage.svg",
        "evaluation.json",
        "benchmark.json",
        "dense",
        "params.yaml",
        "dvc.lock",
    }


def test_second_publish_changes_nothing(client: MlflowClient) -> None:
    assert find_publication(MODEL, "0.2") is None
    first = publish(MODEL, "0.2")
    before = everything(client)
    second = publish(MODEL, "0.2")
    assert find_publication(MODEL, "0.2") == second
    assert (second.version, second.is_new) == (first.version, False)
    assert everything(client) == before


def test_every_budget_has_an_alias_and_the_newest_is_the_candidate(workspace: Workspace) -> None:
    workspace.make_results("0.5")
    publish(MODEL, "0.2")
    publish(MODEL, "0.5")
    publish(MODEL, "0.2")
    assert aliases(workspace.client) == {"ratio-0_2": 1, "ratio-0_5": 2, "candidate": 2}


def test_earlier_content_is_found_again(workspace: Workspace) -> None:
    publish(MODEL, "0.2")
    workspace.make_results(seed=1)
    assert publish(MODEL, "0.2").version == 2
    workspace.make_results()
    assert find_publication(MODEL, "0.2") is None  # The alias is that of the other content.
    assert publish(MODEL, "0.2").version == 1
    assert aliases(workspace.client) == {"ratio-0_2": 1, "candidate": 2}


def test_new_evaluation_of_the_same_checkpoint_is_a_run_but_no_version(workspace: Workspace) -> None:
    publish(MODEL, "0.2")
    workspace.make_results(perplexity=22.0)
    assert publish(MODEL, "0.2").version == 1
    client = workspace.client
    (version,) = client.search_model_versions(f"name = '{MODEL}'")
    assert client.get_run(version.tags["evaluation_run"]).data.metrics["perplexity"] == 22.0


def crash_once(monkeypatch: pytest.MonkeyPatch, owner: Any, step: str, moment: str) -> None:
    """Publishes and stops before or after a step, as kill -9 would: nothing is tidied up that a program could tidy."""
    original = getattr(owner, step)

    def crash(*args: Any, **kwargs: Any) -> Any:
        if moment == "after":
            original(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, crash)
        for tidying in ("numprune.files._remove", "shutil.rmtree"):
            patch.setattr(tidying, lambda *_args, **_options: None)
        with pytest.raises(KeyboardInterrupt):
            publish(MODEL, "0.2")


def check_mended(client: MlflowClient) -> None:
    """Publishes again; then all is there, once, and a further call changes nothing."""
    assert publish(MODEL, "0.2").version == 1
    assert aliases(client) == {"ratio-0_2": 1, "candidate": 1}
    experiment = client.get_experiment_by_name("numprune").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert all(len(client.get_metric_history(run.info.run_id, name)) == 1 for name in run.data.metrics)
    (model,) = client.search_logged_models([experiment])
    place = version_folder.local_path(model.artifact_location)
    assert place is not None
    assert [path.name for path in place.parent.parent.iterdir()] == [model.model_id]
    assert [path.name for path in place.parent.iterdir()] == ["artifacts"]
    tags = client.get_model_version(MODEL, "1").tags
    assert tags["statement_hash"] == hashlib.sha256((place / "provenance/statement.json").read_bytes()).hexdigest()
    assert not Path(".numprune/staging").exists()
    before = everything(client)
    publish(MODEL, "0.2")
    assert everything(client) == before


@pytest.mark.parametrize(
    "step",
    [
        "create_experiment",
        "create_run",
        "log_batch",
        "log_artifact",
        "log_artifacts",
        "create_logged_model",
        "set_logged_model_tags",
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
    crash_once(monkeypatch, MlflowClient, step, moment)
    check_mended(client)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "step", ["tasks.publish.assemble", "tasks.publish.write_evidence", "tasks.registry.version_folder._write_mlmodel"]
)
def test_crash_while_files_are_written_is_mended_by_the_next_call(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, step: str, moment: str
) -> None:
    module, _, name = step.rpartition(".")
    crash_once(monkeypatch, importlib.import_module(module), name, moment)
    check_mended(client)


def test_a_crash_and_another_commit_leave_tags_and_statement_of_one_moment(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_once(monkeypatch, MlflowClient, "finalize_logged_model", "after")
    monkeypatch.setattr("tasks.publish.git_state", lambda: {"git_commit": "another", "git_dirty": "false"})
    publish(MODEL, "0.2")
    version = client.get_model_version(MODEL, "1")
    assert version.tags["git_commit"] != "another"
    check_mended(client)


def test_bytes_are_shared_with_the_cache_and_not_copied(client: MlflowClient) -> None:
    publish(MODEL, "0.2")
    folder = version_folder.local_folder(client, client.get_model_version(MODEL, "1"), Path("unused"))
    for path in (path for path in CHECKPOINT.rglob("*") if path.is_file()):
        assert (folder / path.relative_to(CHECKPOINT)).stat().st_ino == path.stat().st_ino
    assert (folder / "MLmodel").stat().st_nlink == 1


def test_what_may_be_edited_in_place_is_copied(client: MlflowClient) -> None:
    (CHECKPOINT / "config.json").chmod(0o644)
    publish(MODEL, "0.2")
    folder = version_folder.local_folder(client, client.get_model_version(MODEL, "1"), Path("unused"))
    assert (folder / "config.json").stat().st_ino != (CHECKPOINT / "config.json").stat().st_ino
    assert (folder / "model.safetensors").stat().st_nlink == 2


def test_symbolic_links_to_the_cache_become_files(client: MlflowClient, tmp_path: Path) -> None:
    weights = CHECKPOINT / "model.safetensors"
    cached = tmp_path / "cached"
    weights.rename(cached)
    weights.symlink_to(cached)
    publish(MODEL, "0.2")
    folder = version_folder.local_folder(client, client.get_model_version(MODEL, "1"), Path("unused"))
    assert not (folder / weights.name).is_symlink()
    assert (folder / weights.name).stat().st_ino == cached.stat().st_ino


def test_store_elsewhere_gets_an_upload(workspace: Workspace, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.edit_parameters("registry", artifacts=s3)
    crash_once(monkeypatch, MlflowClient, "log_model_artifacts", "after")
    assert publish(MODEL, "0.2").version == 1
    client = workspace.client
    version = client.get_model_version(MODEL, "1")
    folder = version_folder.local_folder(client, version, Path("fetched"))
    assert folder.is_relative_to(Path("fetched").resolve())
    assert (folder / "model.safetensors").read_bytes() == (CHECKPOINT / "model.safetensors").read_bytes()
    assert (folder / "serving/numprune_serving.py").is_file()
    assert not (folder / version_folder.DOWNLOAD_MARK).exists()
    assert list(Path(".numprune/staging").iterdir()) == []


def test_tags_say_what_people_filter_by(workspace: Workspace) -> None:
    workspace.make_results(tasks={"arc": {"accuracy": 0.75, "stderr": 0.02}})
    publish(MODEL, "0.2")
    client = workspace.client
    version = client.get_model_version(MODEL, "1")
    expected = {"source": f"models/{MODEL}", "revision": "none", "perplexity": "21", "dense_perplexity": "20"}
    expected |= {"perplexity_ratio": "1.05", "tokens_per_second": "11", "speed_up": "1.1", "accuracy.arc": "0.75"}
    expected |= {name: str(number) for name, number in weights_size(CHECKPOINT).items()}
    expected |= {"peak_memory_bytes": "180"}
    assert expected.items() <= version.tags.items()
    logged = client.get_run(version.run_id).data.metrics
    assert (logged["accuracy.arc"], logged["accuracy_stderr.arc"], logged["dense_accuracy.arc"]) == (0.75, 0.02, 0.8)
    (found,) = client.search_model_versions(f"name = '{MODEL}' and tags.perplexity = '21'")
    assert found.version == version.version


def test_origin_is_that_of_the_fetched_model(client: MlflowClient) -> None:
    content = yaml.safe_load(Path("dvc.lock").read_text(encoding="utf-8"))
    download = {"repository": "team/model", "revision": "a" * 40}
    fetched = content["stages"][f"calibrate@{MODEL}"]["deps"]
    parameters = {"params.yaml": {f"downloads.{MODEL}": download}}
    content["stages"][f"download@{MODEL}"] = {"params": parameters, "outs": fetched}
    asked = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    write(Path("params.yaml"), yaml.safe_dump(asked | {"downloads": {MODEL: download}}))
    write(Path("dvc.lock"), yaml.safe_dump(content))
    publish(MODEL, "0.2")
    tags = client.get_model_version(MODEL, "1").tags
    assert (tags["source"], tags["revision"]) == ("team/model", "a" * 40)


def test_results_that_are_not_those_in_the_lock_are_refused(client: MlflowClient) -> None:
    write(CHECKPOINT.with_name("evaluation.json"), {"perplexity": 1.0})
    with pytest.raises(NumpruneError, match=r"evaluation\.json .* run `dvc repro` first"):
        publish(MODEL, "0.2")
    assert client.search_registered_models() == []


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket on a server of its own."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{host}:{port}")
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="versions")
    yield "s3://versions/numprune"
    server.stop()


@pytest.mark.usefixtures("client")
def test_stage_that_has_not_run() -> None:
    with pytest.raises(NumpruneError, match=r"0\.7/plan\.json is missing"):
        publish(MODEL, "0.7")


def test_stages_of_budgets_that_are_no_longer_asked_for_do_not_count(client: MlflowClient) -> None:
    """`dvc.lock` keeps them with the hashes of their time, and they may stand after those of the version."""
    document = yaml.safe_load(Path("dvc.lock").read_text(encoding="utf-8"))
    stale = [{"path": f"artifacts/{MODEL}/calibration.safetensors", "hash": "md5", "md5": "0" * 32, "size": 1}]
    document["stages"][f"compensate@{MODEL}-0.9"] = {"cmd": "x", "deps": stale, "outs": []}
    Path("dvc.lock").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    published = publish(MODEL, "0.2")
    found = client.get_model_version(MODEL, str(published.version)).tags["calibration_hash"]
    assert found == hashlib.md5(Path(f"artifacts/{MODEL}/calibration.safetensors").read_bytes()).hexdigest()


def test_changes_of_the_code_count_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo of images runs in a folder that git ignores."""
    own = tmp_path / "own/folder"
    own.mkdir(parents=True)
    monkeypatch.chdir(own)
    for name, text in ((".gitignore", "/own/"), ("code", "first"), ("dvc.lock", "first")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "All"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "dvc.lock").write_text("second", encoding="utf-8")
    assert git_state()["git_dirty"] == "false"
    (tmp_path / "code").write_text("second", encoding="utf-8")
    assert git_state()["git_dirty"] == "true"
