"""The real flow in a copy of the repository: Prefect's own server, DVC, MLflow on SQLite, a tiny model.

The tests go through the life of one checkout, in the order in which they stand here.
"""

import contextlib
import hashlib
import json
import re
import sqlite3
import sys
from pathlib import Path

import pytest
import yaml

from tests.flows.conftest import MODEL, Checkout, Server

pytestmark = pytest.mark.pipeline

ALL_STAGES = {
    "corpus",
    "digits",
    "texts",
    "calibrate",
    "capture",
    "score",
    "prune",
    "compensate",
    "evaluate_dense",
    "evaluate",
    "benchmark",
    "summary",
}
FROM_PRUNE_ON = {"prune", "compensate", "evaluate", "benchmark", "summary"}
# Timings differ from run to run, and what is made from them.
TIMED = ("benchmark.json", "timing.json", "report/")


def locked_results(root: Path) -> dict[str, str]:
    stages = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    results = {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}
    return {path: md5 for path, md5 in results.items() if not any(part in path for part in TIMED)}


def test_dvc_alone_reproduces_every_file(checkout: Checkout, prefect_server: Server) -> None:
    """And so do two processes of a Dask cluster."""
    done = checkout.run("dvc", "repro")
    assert done.returncode == 0, done.stdout
    assert not (checkout.root / "mlflow").exists()
    assert not (checkout.root / ".prefect").exists()
    first = locked_results(checkout.root)
    assert len(first) == 16

    # Again from nothing, under Prefect: the same contents.
    for name in ("dvc.lock", "artifacts", "report", "data", ".dvc/cache"):
        checkout.run("rm", "-rf", name)
    # The last budget that is published is the candidate.
    checkout.edit_parameters(lambda content: content.update(budgets=[0.4, 0.2]))
    checkout.edit_parameters(lambda content: content["orchestration"].update(runner="dask"))
    checkout.commit("Two budgets on Dask")
    run = checkout.compress(**prefect_server.environment)
    assert run.code == 0, run.output
    assert run.ran == ALL_STAGES
    assert "16 stages run, 0 unchanged; 2 of 2 versions newly published." in run.output
    assert first.items() <= locked_results(checkout.root).items()
    assert len(set(re.findall(r": on \S+, process (\d+)", run.output))) == 2
    assert "capture 2/2, 0 s left" in prefect_server.logs()


def test_second_run_does_nothing(checkout: Checkout) -> None:
    before = (checkout.root / "dvc.lock").read_bytes()
    run = checkout.compress()  # There is no server, and none is started.
    assert run.code == 0, run.output
    assert run.ran == set()
    assert "0 stages run, 16 unchanged; 0 of 2 versions newly published." in run.output
    assert f"{MODEL} 0.2" in run.output
    assert (checkout.root / "dvc.lock").read_bytes() == before
    assert not (checkout.root / ".prefect").exists()


def test_registered_version_is_fetched_by_alias_and_loads(checkout: Checkout) -> None:
    # In a process that never imports numprune: the checkpoint carries its own modelling code.
    program = """
import json, sys
import mlflow
from transformers import AutoModelForCausalLM, AutoTokenizer

mlflow.set_tracking_uri("sqlite:///mlflow/mlflow.db")
folder = mlflow.artifacts.download_artifacts("models:/tiny@candidate")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = AutoTokenizer.from_pretrained(folder)("A pruned model", return_tensors="pt").input_ids
model.generate(ids, max_new_tokens=4, do_sample=False)
assert "numprune" not in sys.modules
candidate, fifth = (mlflow.MlflowClient().get_model_version_by_alias("tiny", a) for a in ("candidate", "ratio-0_2"))
assert candidate.version == fifth.version
print(json.dumps({"parameters": model.num_parameters(), "tags": candidate.tags}))
"""
    done = checkout.run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stdout
    said = json.loads(done.stdout.splitlines()[-1])
    benchmark = json.loads((checkout.root / f"artifacts/{MODEL}/0.2/benchmark.json").read_text(encoding="utf-8"))
    assert said["parameters"] == benchmark["pruned"]["parameters"] < benchmark["dense"]["parameters"]
    plan = (checkout.root / f"artifacts/{MODEL}/0.2/plan.json").read_bytes()
    assert said["tags"]["plan_hash"] == hashlib.md5(plan).hexdigest()
    assert said["tags"]["git_dirty"] == "false"
    assert said["tags"]["git_commit"] == checkout.run("git", "rev-parse", "HEAD").stdout.strip()


def test_sweep_has_parameters_and_results_of_its_own_and_computes_nothing_twice(checkout: Checkout) -> None:
    checkout.edit_parameters(lambda content: content["orchestration"].update(runner="threads"))
    checkout.commit("Threads")
    root = checkout.root
    before = {path: path.read_bytes() for path in (root / "params.yaml", root / "dvc.lock", root / "report/index.html")}
    versions = "SELECT count(*) FROM model_versions"
    wrong = checkout.run(sys.executable, "-m", "flows.sweep", "--budgets", "0.2,1.4", "--models", f"{MODEL},{MODEL}")
    assert wrong.returncode == 2
    assert "params.yaml has 2 mistake(s)" in wrong.stdout
    assert not (root / ".numprune").exists()

    command = (sys.executable, "-m", "flows.sweep", "--budgets", "0.2,0.3")
    done = checkout.run(*command)
    assert done.returncode == 0, done.stdout
    # One plan, checkpoint, evaluation, benchmark and the summary; all that is shared comes from the cache.
    assert "5 stages run, 0 unchanged, 11 restored from DVC's cache; the sweep is recorded" in done.stdout
    assert f"{MODEL} 0.3" in done.stdout
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not (root / f"artifacts/{MODEL}/0.3").exists()
    page = (root / "report/sweep/index.html").read_text(encoding="utf-8")
    assert f"runs/{MODEL}-0.3.html" in page
    assert f"runs/{MODEL}-0.2.html" in page

    again = checkout.run(*command)
    assert again.returncode == 0, again.stdout
    assert "0 stages run, 16 unchanged; the sweep is already recorded" in again.stdout
    with contextlib.closing(sqlite3.connect(root / "mlflow/mlflow.db")) as database:
        assert database.execute(versions).fetchone() == (2,)
        children = "SELECT count(*) FROM tags WHERE key = 'mlflow.parentRunId'"
        assert database.execute(children).fetchone() == (2,)
        named = "SELECT key, value FROM tags WHERE key IN ('git_commit', 'git_dirty')"
        states = set(database.execute(named))
    commits = checkout.run("git", "rev-parse", "HEAD", "HEAD~1").stdout.split()  # Of the sweep and of the versions.
    assert states == {("git_dirty", "false"), *(("git_commit", commit) for commit in commits)}


def test_another_budget_redoes_nothing_before_the_plan(checkout: Checkout) -> None:
    checkout.edit_parameters(lambda content: content.update(budgets=[0.2, "size-300kB"]))
    run = checkout.compress()
    assert run.code == 0, run.output
    assert run.ran == FROM_PRUNE_ON
    assert run.ended[f"evaluate@{MODEL}-0.2"] == "Unchanged"
    assert run.ended[f"evaluate@{MODEL}-size-300kB"] == "Completed"
    assert "5 stages run, 11 unchanged; 1 of 2 versions newly published." in run.output


def test_another_calibration_seed_redoes_what_depends_on_it(checkout: Checkout) -> None:
    def edit(content: dict) -> None:
        content["budgets"] = [0.2]
        content["calibration"]["seed"] = 1

    checkout.edit_parameters(edit)
    run = checkout.compress()
    assert run.code == 0, run.output
    assert run.ran == ALL_STAGES - {"corpus", "digits", "texts", "evaluate_dense"}
    assert "1 of 1 versions newly published." in run.output


def test_mistake_found_by_a_stage_is_one_message(checkout: Checkout) -> None:
    (checkout.root / "short.txt").write_text("Too short.", encoding="utf-8")
    checkout.edit_parameters(lambda content: content["calibration"].update(data="short.txt"))
    run = checkout.compress()
    assert run.code == 2, run.output
    assert "Traceback" not in run.output
    assert "Retry" not in run.output
    assert run.ended[f"calibrate@{MODEL}"] == "Rejected"
    last_error = run.output[run.output.rindex("\nerror: ") :]
    assert f"calibrate@{MODEL}" in last_error
    assert "short.txt" in last_error


def test_mistakes_in_the_parameters_are_told_before_anything_starts(checkout: Checkout) -> None:
    def edit(content: dict) -> None:
        content["calibration"]["sampels"] = 3
        content["budgets"] = [1.5]

    checkout.edit_parameters(edit)
    run = checkout.compress()
    assert run.code == 2
    assert "server" not in run.output
    assert "Traceback" not in run.output
    assert "calibration.sampels" in run.output
    assert "budgets.0" in run.output
