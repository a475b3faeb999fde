"""What the pages are made of."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from numprune.allocation import Shapes
from tasks.layout import SWEEP_REPORT, report_page
from tasks.parameters import Promotion, load_parameters
from tasks.report.commands import app
from tasks.report.limits import check_limits
from tasks.report.lineage import library_command
from tasks.report.pareto import pareto_front
from tasks.report.plots import kept_units, run_plots
from tasks.report.results import Results, read_results
from tasks.report.sentences import sentences
from tasks.report.table import cost_lines, quality_lines
from tests.tasks.made_up_results import MODEL

NO_LIMITS = Promotion(max_perplexity_ratio=None)


@pytest.fixture
def results(budgets: list[str]) -> Results:
    return read_results(MODEL, budgets[0], load_parameters().workload)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    def dominates(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    wanted = {i for i, p in enumerate(points) if not any(dominates(other, p) for other in points)}
    front = pareto_front(points)
    assert set(front) == wanted
    assert front == sorted(front, key=lambda index: points[index])


@pytest.mark.parametrize(
    ("limits", "met"),
    [
        ({"max_perplexity": 20.5}, [True]),
        ({"max_perplexity": 20.4}, [False]),
        ({"max_perplexity_ratio": 1.02}, [False]),
        # A drop of 0.01 with a standard error of 0.01, in both tasks.
        ({"max_accuracy_drop": 0.0, "standard_errors": 1.5}, [True, True]),
        ({"max_accuracy_drop": 0.0, "standard_errors": 0.5}, [False, False]),
        ({"max_accuracy_drop": 0.02, "standard_errors": 0.0}, [True, True]),
        ({"min_speed_up": 1.3}, [False]),
        ({"max_memory": "25MB"}, [True]),
        ({"max_memory": "24MB"}, [False]),
        ({}, []),
    ],
)
def test_limits(results: Results, limits: dict, met: list[bool]) -> None:
    promotion = NO_LIMITS.model_copy(update=limits)
    assert [check.criterion.passed for check in check_limits(results.documents, promotion)] == met


def test_table_has_every_metric_and_flags_what_is_beyond_a_limit(results: Results) -> None:
    checks = check_limits(results.documents, NO_LIMITS.model_copy(update={"max_perplexity_ratio": 1.01}))
    quality, cost = quality_lines(results, checks), cost_lines(results, checks)
    assert [line.metric for line in quality if line.broken] == ["Perplexity"]
    assert not any(line.broken for line in cost)
    accuracy = next(line for line in quality if line.metric == "a")
    assert (accuracy.dense.figure, accuracy.dense.below, accuracy.change.figure) == ("50.0%", "± 2.0", "-1.0")
    assert accuracy.note == "95% interval -3.0 to +1.0, on the same 400 questions"
    speed = cost[0]
    assert (speed.dense.figure, speed.dense.below, speed.change.figure) == ("50", "45 to 56", "1.20 ×")
    assert speed.note == "2.00 × to be expected from the bytes read for a token; measured is 60% of that"


def test_plain_words(results: Results) -> None:
    said = " ".join(sentences(results))
    assert "from 20.00 to 20.50 (+2.5%; lower is better)" in said
    assert "without compensation it is 30.50: compensation takes back 95% of that rise" in said
    assert "no different, as far as these questions can tell, in all of 2 tasks" in said
    assert "1.20 times as many tokens per second, where the bytes it reads let one expect 2.00 times" in said


def test_plots_without_scores_or_prices(results: Results) -> None:
    def names(shown: Results) -> list[str]:
        return [plot.name for plot in run_plots(shown)]

    assert names(results) == ["kept", "scores", "threshold", "reconstruction"]
    assert names(replace(results, prices={})) == ["kept", "scores", "reconstruction"]
    assert names(replace(results, prices={}, rankings={})) == ["kept", "reconstruction"]


def test_removed_share_lies_below_the_threshold(results: Results) -> None:
    """The histogram holds all parameters that have a price, each once."""
    (plot,) = (plot for plot in run_plots(results) if plot.name == "threshold")
    priced = sum(row[2] + row[3] for row in plot.rows)
    # One unit of every group may not go.
    stuck = sum(group.unit_parameters for group in results.plan.groups.values()) / results.plan.dense_parameters
    assert priced == pytest.approx(1 - stuck)


def test_whole_modules_may_be_gone(results: Results) -> None:
    """No unit left, and no group at all, as in a model pruned once more."""
    groups = dict(results.plan.groups)
    groups["0.mlp"] = replace(groups["0.mlp"], kept=(), lowest_kept=None)
    del groups["1.attention"]
    kept = kept_units(replace(results.plan, groups=groups))
    assert (0, "channels", 80, 0, 0.0) in kept.rows
    assert len(kept.rows) == 5


def test_library_command(results: Results) -> None:
    parameters = load_parameters()
    said = library_command(results, parameters)
    assert said is not None
    assert said.splitlines()[:3] == ["numprune prune models/small \\", "  --ratio 0.5 \\", "  --recipe best \\"]
    other = replace(results.recipe, recovery="bias", shapes=Shapes(heads=2, depth=True), damping=0.01)
    plan = replace(results.plan, recipe=vars(other) | {"shapes": vars(other.shapes)})
    said = library_command(replace(results, plan=plan, budget="memory-2GB"), parameters)
    assert said is not None
    for words in ("--memory 2GB", "--batch 1", "--context 512", "--recovery bias", "--heads 2", "--depth"):
        assert f"  {words} \\" in said.splitlines()


@pytest.mark.usefixtures("budgets")
def test_command_names_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    missing = CliRunner().invoke(app, [f"{MODEL}-0.5"])
    assert missing.exit_code == 2
    assert "run `make demo` or `make sweep` first" in missing.output
    page, swept = report_page(MODEL, "0.5"), SWEEP_REPORT / "runs" / f"{MODEL}-0.3.html"
    for path in (page, swept, SWEEP_REPORT / "index.html"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert CliRunner().invoke(app, [f"{MODEL}-0.5"]).output == f"{page.absolute()}\n"
    assert CliRunner().invoke(app, [f"{MODEL}-0.3"]).output == f"{swept.absolute()}\n"
    assert opened == []
    assert CliRunner().invoke(app, ["sweep", "--open"]).exit_code == 0
    assert opened == [(SWEEP_REPORT / "index.html").absolute().as_uri()]
    other = CliRunner().invoke(app, [f"{MODEL}-0.4"])
    assert other.exit_code == 2
    assert f"there are pages of sweep, {MODEL}-0.3, {MODEL}-0.5" in other.output
