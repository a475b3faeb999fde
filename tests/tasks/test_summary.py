import json

import pytest

from tasks.layout import REPORT
from tasks.parameters import load_parameters
from tasks.summary import cells, read_rows, summarise
from tests.tasks.made_up_results import MODEL


def test_dense_first_then_rising_shares(budgets: list[str]) -> None:
    dense, fifth, half = read_rows(MODEL, budgets, load_parameters().promotion)
    assert (dense["budget"], fifth["budget"], half["budget"]) == (None, "0.2", "0.5")
    assert cells(dense) == ("small", "dense", "10.00 M", "20.0 MB", "20.00", "", "70.0%", "50", "1.00 x", "50 MB", "")
    assert cells(fifth) == (
        "small 0.2",
        "19.9%",
        "8.00 M",
        "16.0 MB",
        "20.20",
        "30.20",
        "69.0%",
        "60",
        "1.20 x",
        "40 MB",
        "",
    )


def test_limits_that_are_not_kept(budgets: list[str]) -> None:
    promotion = load_parameters().promotion.model_copy(update={"max_perplexity_ratio": 1.02, "max_memory": "30MB"})
    rows = read_rows(MODEL, budgets, promotion)
    assert [cells(row)[-1] for row in rows] == ["", "peak memory", "perplexity ratio"]


@pytest.mark.usefixtures("budgets")
def test_table_picture_and_pages_are_written() -> None:
    summarise()
    written = ["index.html", "perplexity.png", "plots", "runs", "summary.json", "summary.md"]
    assert sorted(path.name for path in REPORT.iterdir()) == written
    assert sorted(path.name for path in (REPORT / "runs").iterdir()) == ["small-0.2.html", "small-0.5.html"]
    assert len(json.loads((REPORT / "summary.json").read_text(encoding="utf-8"))["rows"]) == 3
    lines = (REPORT / "summary.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5 + 1 + 5 + 1 + 5
    assert lines[6] == "| perplexity | wikitext2 |"
    assert lines[9] == "| small 0.2 | 30.20 |"
    assert lines[12] == "| accuracy | a | b |"
    assert lines[14] == "| small | 50.0% ± 2.0% | 90.0% ± 1.0% |"
    assert lines[15] == "| small 0.2 | 49.0% (-3.0% to +1.0%) | 89.0% (-3.0% to +1.0%) |"
    assert (REPORT / "perplexity.png").read_bytes().startswith(b"\x89PNG")
