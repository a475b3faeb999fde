import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.layout import REPORT, benchmark_file, evaluation_file, plan_file
from tasks.summary import cells, read_rows, summarise

ROOT = Path(__file__).parents[2]
MODEL = "small"


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content |= {"models": [MODEL], "budgets": ["0.5", "0.2"]}
    Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    tasks = {"a": {"accuracy": 0.5, "stderr": 0.02}, "b": {"accuracy": 0.9, "stderr": 0.01}}
    write(evaluation_file(MODEL, None), {"perplexity": 20.0, "tasks": tasks})
    for budget in content["budgets"]:
        ratio = float(budget)
        dense = {"parameters": 10_000_000, "checkpoint_bytes": 20_000_000, "peak_memory_bytes": 5e7}
        pruned = {name: value * (1 - ratio) for name, value in dense.items()}
        write(plan_file(MODEL, budget), {"achieved_ratio": ratio - 0.001})
        against = {"against_dense": {"low": -0.03, "high": 0.01}}
        evaluation = {"perplexity": 20 + ratio, "perplexity_without_compensation": 30 + ratio}
        evaluation["tasks"] = {name: task | against for name, task in tasks.items()}
        write(evaluation_file(MODEL, budget), evaluation)
        speeds = {"dense": {**dense, "tokens_per_second": 50.0}, "pruned": {**pruned, "tokens_per_second": 60.0}}
        write(benchmark_file(MODEL, budget), speeds)
    return content["budgets"]


def test_dense_first_then_rising_shares(budgets: list[str]) -> None:
    dense, fifth, half = read_rows(MODEL, budgets)
    assert (dense["budget"], fifth["budget"], half["budget"]) == (None, "0.2", "0.5")
    assert cells(dense) == ("small", "dense", "10.00 M", "20.0 MB", "20.00", "", "70.0%", "50", "1.00 x", "50 MB")
    assert cells(fifth) == (
        "small 0.2",
        "19.9%",
        "8.00 M",
        "16.0 MB",
        "20.20",
        "30.20",
        "70.0%",
        "60",
        "1.20 x",
        "40 MB",
    )


@pytest.mark.usefixtures("budgets")
def test_table_and_picture_are_written() -> None:
    summarise()
    assert sorted(path.name for path in REPORT.iterdir()) == ["perplexity.png", "summary.json", "summary.md"]
    assert len(json.loads((REPORT / "summary.json").read_text(encoding="utf-8"))["rows"]) == 3
    lines = (REPORT / "summary.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5 + 1 + 5
    assert lines[6] == "| accuracy | a | b |"
    assert lines[8] == "| small | 50.0% ± 2.0% | 90.0% ± 1.0% |"
    assert lines[9] == "| small 0.2 | 50.0% (-3.0% to +1.0%) | 90.0% (-3.0% to +1.0%) |"
    assert (REPORT / "perplexity.png").read_bytes().startswith(b"\x89PNG")
