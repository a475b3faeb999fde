"""The gate, without a registry."""

import math
from typing import Any

import pytest

from tasks.parameters import Promotion
from tasks.registry.policy import NOT_MEASURED, Criterion, Figures, evaluate

OFF: dict[str, Any] = {"max_perplexity_ratio": None, "undominated": False}
METRICS = {
    "perplexity": 21.0,
    "dense_perplexity": 20.0,
    "tokens_per_second": 12.0,
    "dense_tokens_per_second": 10.0,
    "peak_memory_bytes": 4e9,
    "accuracy.arc": 0.70,
    "accuracy_difference_stderr.arc": 0.02,
    "dense_accuracy.arc": 0.75,
}


def only(policy: dict[str, Any], metrics: dict[str, float], champion: Figures | None = None) -> Criterion:
    (criterion,) = evaluate(Promotion(**OFF | policy), Figures(metrics, "same"), champion)
    return criterion


@pytest.mark.parametrize(
    ("policy", "value", "limit", "passed"),
    [
        ({"max_perplexity": 21}, "21", "at most 21", True),
        ({"max_perplexity": 20.9}, "21", "at most 20.9", False),
        ({"max_perplexity_ratio": 1.05}, "1.05", "at most 1.05", True),
        ({"max_perplexity_ratio": 1.04}, "1.05", "at most 1.04", False),
        ({"min_speed_up": 1.2}, "1.2", "at least 1.2", True),
        ({"min_speed_up": 1.3}, "1.2", "at least 1.3", False),
        ({"max_memory": "4GB"}, "4 GB", "at most 4 GB", True),
        ({"max_memory": "3900MB"}, "4 GB", "at most 3.9 GB", False),
        # A drop of 5 points; two standard errors are 4 points.
        ({"max_accuracy_drop": 0.01}, "5.0% ± 2.0%", "at most 1.0%", True),
        ({"max_accuracy_drop": 0.009}, "5.0% ± 2.0%", "at most 0.9%", False),
        ({"max_accuracy_drop": 0.01, "standard_errors": 1}, "5.0% ± 2.0%", "at most 1.0%", False),
    ],
)
def test_limits(policy: dict[str, Any], value: str, limit: str, passed: bool) -> None:
    metrics = METRICS | {"accuracy.arc": 0.70 + 1e-9}
    criterion = only(policy, metrics)
    assert (criterion.value, criterion.limit, criterion.passed) == (value, limit, passed)


@pytest.mark.parametrize(
    ("policy", "metric"),
    [
        ({"max_perplexity": 100}, "perplexity"),
        ({"max_perplexity_ratio": 100}, "dense_perplexity"),
        ({"min_speed_up": 0.1}, "tokens_per_second"),
        ({"max_memory": "1TB"}, "peak_memory_bytes"),
        ({"max_accuracy_drop": 0.9}, "accuracy.arc"),
        ({"max_accuracy_drop": 0.9}, "dense_accuracy.arc"),
        ({"undominated": True}, "tokens_per_second"),
    ],
)
@pytest.mark.parametrize("value", [None, math.nan])
def test_what_was_not_measured_does_not_pass(policy: dict[str, Any], metric: str, value: float | None) -> None:
    metrics = {name: number for name, number in METRICS.items() if name != metric}
    if value is not None:
        metrics[metric] = value
    criterion = only(policy, metrics, Figures(METRICS, "same"))
    assert (criterion.value, criterion.passed) == (NOT_MEASURED, False)


def test_accuracy_limit_without_any_task_does_not_pass() -> None:
    criterion = only({"max_accuracy_drop": 0.5}, {"perplexity": 1.0})
    assert (criterion.value, criterion.passed) == (NOT_MEASURED, False)


def test_drop_without_standard_error_counts_in_full() -> None:
    metrics = {"accuracy.arc": 0.7, "dense_accuracy.arc": 0.75}
    assert not only({"max_accuracy_drop": 0.04}, metrics).passed
    assert only({"max_accuracy_drop": 0.06}, metrics).passed


def test_every_task_is_a_criterion() -> None:
    metrics = METRICS | {"accuracy.boolq": 0.5, "dense_accuracy.boolq": 0.9}
    arc, boolq = evaluate(Promotion(**OFF | {"max_accuracy_drop": 0.1}), Figures(metrics, ""), None)
    assert (arc.name, arc.passed) == ("accuracy drop arc", True)
    assert (boolq.name, boolq.passed) == ("accuracy drop boolq", False)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"perplexity": 22.0}, True),  # Within 5 %.
        ({"perplexity": 23.0}, False),
        ({"tokens_per_second": 11.0}, False),
        ({"peak_memory_bytes": 5e9}, False),
        ({"perplexity": 23.0, "tokens_per_second": 15.0}, True),
        ({"perplexity": 30.0, "peak_memory_bytes": 3e9}, True),
        ({"perplexity": 23.0, "tokens_per_second": 12.3}, False),  # Better by less than the tolerance.
        ({"perplexity": 10.0, "tokens_per_second": 20.0, "peak_memory_bytes": 1e9}, True),
    ],
)
def test_candidate_must_not_be_dominated(changes: dict[str, float], passed: bool) -> None:
    criterion = only({"undominated": True}, METRICS | changes, Figures(METRICS, "same"))
    assert criterion.passed is passed, criterion


def test_nothing_dominates_the_first_candidate() -> None:
    assert only({"undominated": True}, METRICS).passed


def test_figures_of_another_protocol_are_not_compared() -> None:
    criterion = only({"undominated": True}, METRICS | {"perplexity": 1.0}, Figures(METRICS, "another"))
    assert (criterion.value, criterion.passed) == ("not comparable", False)
    assert "promotion.undominated" in criterion.why


def test_limits_that_are_not_set_are_not_applied() -> None:
    assert evaluate(Promotion(**OFF), Figures({}, ""), None) == []
