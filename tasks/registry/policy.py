"""The gate: what a version has to reach to become the champion, as the section `promotion` of params.yaml says."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from numprune.budget import parse_budget, readable
from tasks.parameters import Promotion

NOT_MEASURED = "not measured"

# Whether more is better.
_OBJECTIVES = {"perplexity": False, "tokens_per_second": True, "peak_memory_bytes": False}


@dataclass(frozen=True)
class Criterion:
    """One requirement.

    Attributes:
        name: What is required.
        value: What was found, for people.
        limit: What was asked for, for people.
        passed: Whether it is met.
        why: What made it so, where value and limit do not say it.
    """

    name: str
    value: str
    limit: str
    passed: bool
    why: str = ""


@dataclass(frozen=True)
class Figures:
    """What was measured of a version.

    Attributes:
        metrics: As its MLflow run holds them; of the dense model with the prefix `dense_`.
        protocol: Hash of how they were measured; figures under different ones cannot be compared.
    """

    metrics: Mapping[str, float]
    protocol: str


def evaluate(policy: Promotion, candidate: Figures, champion: Figures | None) -> list[Criterion]:
    """Compares a candidate with all limits that are set.

    Args:
        policy: The limits.
        candidate: What would become champion.
        champion: What it would replace; None if there is none.
    """
    return list(_criteria(policy, candidate, champion))


def _criteria(policy: Promotion, candidate: Figures, champion: Figures | None) -> Iterator[Criterion]:
    metrics = candidate.metrics
    perplexity, speed = metrics.get("perplexity"), metrics.get("tokens_per_second")
    if policy.max_perplexity is not None:
        yield _at_most("perplexity", perplexity, policy.max_perplexity)
    if policy.max_perplexity_ratio is not None:
        ratio = _quotient(perplexity, metrics.get("dense_perplexity"))
        yield _at_most("perplexity ratio", ratio, policy.max_perplexity_ratio)
    if policy.max_accuracy_drop is not None:
        yield from _accuracy_drops(metrics, policy.max_accuracy_drop, policy.standard_errors)
    if policy.min_speed_up is not None:
        speed_up = _quotient(speed, metrics.get("dense_tokens_per_second"))
        yield _at_least("speed-up", speed_up, policy.min_speed_up)
    if policy.max_memory is not None:
        limit = parse_budget(f"memory-{policy.max_memory}").value
        yield _at_most("peak memory", metrics.get("peak_memory_bytes"), limit, lambda x: readable(x, "memory"))
    if policy.undominated:
        yield _undominated(candidate, champion, policy.tolerance)


def _at_most(name: str, value: float | None, limit: float, show: Callable[[float], str] = "{:.4g}".format) -> Criterion:
    return _criterion(name, value, f"at most {show(limit)}", lambda x: x <= limit, show)


def _at_least(name: str, value: float | None, limit: float) -> Criterion:
    return _criterion(name, value, f"at least {limit:g}", lambda x: x >= limit)


def _criterion(
    name: str,
    value: float | None,
    limit: str,
    holds: Callable[[float], bool],
    show: Callable[[float], str] = "{:.4g}".format,
) -> Criterion:
    if value is None or not math.isfinite(value):
        return Criterion(name, NOT_MEASURED, limit, passed=False)
    return Criterion(name, show(value), limit, passed=holds(value))


def _accuracy_drops(metrics: Mapping[str, float], limit: float, standard_errors: float) -> Iterator[Criterion]:
    """One criterion a task: a drop counts only as far as it is beyond what chance explains."""
    shown = f"at most {limit:.1%}"
    prefixes = ("accuracy.", "dense_accuracy.")
    tasks = sorted({name.removeprefix(prefix) for name in metrics for prefix in prefixes if name.startswith(prefix)})
    if not tasks:
        yield Criterion("accuracy drop", NOT_MEASURED, shown, passed=False)
    for task in tasks:
        name = f"accuracy drop {task}"
        before, after = metrics.get(f"dense_accuracy.{task}"), metrics.get(f"accuracy.{task}")
        # Of the difference on the same questions. Where it is unknown, a drop counts in full.
        error = metrics.get(f"accuracy_difference_stderr.{task}", 0.0)
        if before is None or after is None or not all(map(math.isfinite, (before, after, error))):
            yield Criterion(name, NOT_MEASURED, shown, passed=False)
            continue
        drop = before - after
        passed = drop - standard_errors * error <= limit
        yield Criterion(
            name, f"{drop:.1%} ± {error:.1%}", shown, passed, f"{standard_errors:g} standard errors allowed"
        )


def _undominated(candidate: Figures, champion: Figures | None, tolerance: float) -> Criterion:
    name, limit = "not dominated", "by the champion"
    if champion is None:
        return Criterion(name, "no champion", limit, passed=True)
    pairs = {name: (candidate.metrics.get(name), champion.metrics.get(name)) for name in _OBJECTIVES}
    missing = [name for name, pair in pairs.items() if any(x is None or not math.isfinite(x) for x in pair)]
    if missing:
        return Criterion(name, NOT_MEASURED, limit, passed=False, why=", ".join(missing))
    if candidate.protocol != champion.protocol:
        why = "the two were measured in different ways: measure both alike, or set promotion.undominated to false"
        return Criterion(name, "not comparable", limit, passed=False, why=why)
    better: list[str] = []
    worse: list[str] = []
    for objective, more_is_better in _OBJECTIVES.items():
        mine, theirs = (float(x or 0) for x in pairs[objective])
        if abs(mine - theirs) > tolerance * abs(theirs):
            (better if (mine > theirs) is more_is_better else worse).append(objective)
    if worse and not better:
        return Criterion(name, "dominated", limit, passed=False, why=f"worse in {', '.join(worse)}, better in nothing")
    why = f"better in {', '.join(better)}" if better else f"within {tolerance:.0%} in everything"
    return Criterion(name, "not dominated", limit, passed=True, why=why)


def _quotient(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None
