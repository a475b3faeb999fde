"""Real MLflow on SQLite; checkpoints are really pruned, their figures are made up."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tasks.parameters import load_parameters
from tasks.publish import PARENT_RUN, publish, read_release
from tasks.sweep import SweepRecord, record_sweep
from tests.tasks.conftest import MODEL, Workspace, write
from tests.tasks.test_publish import everything

SOURCE = {"git_commit": "0" * 40, "git_dirty": "false"}


def record() -> SweepRecord:
    return record_sweep(load_parameters(changes={"budgets": ["0.2", "0.5"]}), SOURCE)


@pytest.fixture
def swept(workspace: Workspace) -> Workspace:
    workspace.make_results("0.5", perplexity=25.0)
    write(Path("report/index.html"), "<p>All runs</p>")
    # The page of one budget names the files it was made of; that of the other is of earlier results.
    release = read_release(MODEL, "0.2")
    hashes = Path("dvc.lock").read_text(encoding="utf-8")
    assert release.plan_hash in hashes
    for budget, text in (("0.2", hashes), ("0.5", "0" * 32)):
        write(Path(f"report/runs/{MODEL}-{budget}.html"), text)
        write(Path(f"report/plots/{MODEL}-{budget}/kept.csv"), "layer,units\n")
    return workspace


def children(client: MlflowClient, parent: str) -> list[Any]:
    experiment = client.get_run(parent).info.experiment_id
    found = client.search_runs([experiment], f"tags.`{PARENT_RUN}` = '{parent}'")
    return sorted(found, key=lambda run: run.info.run_name)


def test_a_sweep_is_a_run_with_a_child_for_every_budget(swept: Workspace) -> None:
    recorded = record()
    assert (recorded.is_new, recorded.children) == (True, 2)
    client = swept.client
    parent = client.get_run(recorded.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["budgets"] == "['0.2', '0.5']"
    assert SOURCE.items() <= parent.data.tags.items()
    curve = client.get_metric_history(recorded.run_id, f"{MODEL}/perplexity")
    shares = [round(1000 * run.data.metrics["achieved_ratio"]) for run in children(client, recorded.run_id)]
    assert [(point.step, point.value) for point in curve] == list(zip(shares, (21.0, 25.0), strict=True))
    logged = {artifact.path for artifact in client.list_artifacts(recorded.run_id)}
    assert logged == {"report", "params.yaml", "dvc.lock"}
    assert "report/index.html" in {artifact.path for artifact in client.list_artifacts(recorded.run_id, "report")}

    fifth, half = children(client, recorded.run_id)
    assert [run.data.metrics["perplexity"] for run in (fifth, half)] == [21.0, 25.0]
    assert {run.info.status for run in (fifth, half)} == {"FINISHED"}
    files = [{a.path for a in client.list_artifacts(run.info.run_id)} for run in (fifth, half)]
    assert files[0] - files[1] == {"report.html", "plots"}
    # Nothing is registered.
    assert client.search_registered_models() == []


def test_the_same_results_are_the_same_sweep_and_others_another(swept: Workspace) -> None:
    first = record()
    before = everything(swept.client)
    second = record()
    assert (second.run_id, second.is_new) == (first.run_id, False)
    assert everything(swept.client) == before
    swept.make_results("0.5", perplexity=24.0)
    third = record()
    assert third.run_id != first.run_id
    assert len(children(swept.client, third.run_id)) == 2


def test_a_version_has_a_run_of_its_own(swept: Workspace) -> None:
    recorded = record()
    publish(MODEL, "0.2")
    (version,) = swept.client.search_model_versions(f"name = '{MODEL}'")
    assert version.run_id not in {run.info.run_id for run in children(swept.client, recorded.run_id)}
    assert not record().is_new
    assert not publish(MODEL, "0.2").is_new


@pytest.mark.parametrize(("step", "calls"), [("create_run", 2), ("log_artifacts", 2), ("set_terminated", 3)])
def test_a_sweep_that_was_cut_short_is_completed(
    swept: Workspace, monkeypatch: pytest.MonkeyPatch, step: str, calls: int
) -> None:
    original, left = getattr(MlflowClient, step), calls

    def crash(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, crash)
        with pytest.raises(KeyboardInterrupt):
            record()
    recorded = record()
    assert recorded.is_new
    experiment = swept.client.get_run(recorded.run_id).info.experiment_id
    runs = swept.client.search_runs([experiment])
    assert len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert not record().is_new
