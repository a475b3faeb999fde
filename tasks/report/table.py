"""The table dense against pruned, as text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numprune.budget import BudgetKind, readable
from tasks.report.limits import Check
from tasks.report.results import Results

# What they are called and how they are written, by their key in the evaluation file.
IMAGE_METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "fid": ("FID", "{:.2f}".format),
    "sfid": ("sFID", "{:.2f}".format),
    "inception_score": ("Inception score", "{:.2f}".format),
    "precision": ("Precision", "{:.3f}".format),
    "recall": ("Recall", "{:.3f}".format),
}


@dataclass(frozen=True)
class Cell:
    """A figure and what stands below it in small print: its error, its range, its unit."""

    figure: str
    below: str = ""


@dataclass(frozen=True)
class Line:
    """One metric.

    Attributes:
        metric: Its name.
        dense: Of the dense model.
        pruned: Of the pruned one.
        change: From the one to the other.
        note: What is to be known about it: an interval, what was to be expected.
        broken: The limits it does not meet, as text.
    """

    metric: str
    dense: Cell
    pruned: Cell
    change: Cell
    note: str = ""
    broken: tuple[str, ...] = ()


def quality_lines(results: Results, checks: Sequence[Check]) -> list[Line]:
    """Perplexity, bits per byte, and the likelihood or the accuracy of every task."""
    dense, pruned = results.dense, results.pruned
    without = pruned["perplexity_without_compensation"]
    lines = [
        _line("Perplexity", dense["perplexity"], pruned["perplexity"], "{:.2f}".format, checks=checks),
        _line("Perplexity without compensation", dense["perplexity"], without, "{:.2f}".format, checks=checks),
    ]
    if dense["bits_per_byte"] is not None:
        lines.append(
            _line("Bits per byte", dense["bits_per_byte"], pruned["bits_per_byte"], "{:.4f}".format, checks=checks)
        )
    for text, figures in pruned["texts"].items():
        before = dense["texts"][text]["perplexity"]
        note = f"{figures['windows']} windows of {figures['length']} tokens"
        lines.append(
            _line(f"Perplexity {text}", before, figures["perplexity"], "{:.2f}".format, checks=checks, note=note)
        )
    lines += _image_lines(dense.get("images"), pruned.get("images"), checks)
    for task, figures in pruned["likelihoods"].items():
        before, against = dense["likelihoods"][task]["bits_per_byte"], figures["against_dense"]
        note = (
            f"bits per byte; 95% interval of the difference {against['low']:+.4f} to {against['high']:+.4f}, on the "
            f"same {figures['documents']} documents"
        )
        lines.append(_line(task, before, figures["bits_per_byte"], "{:.4f}".format, checks=checks, note=note))
    for task, figures in pruned["tasks"].items():
        against = figures["against_dense"]
        low, high = 100 * against["low"], 100 * against["high"]
        lines.append(
            Line(
                task,
                _accuracy(dense["tasks"][task]),
                _accuracy(figures),
                Cell(f"{100 * against['difference']:+.1f}", "points"),
                f"95% interval {low:+.1f} to {high:+.1f}, on the same {figures['questions']} questions",
                _broken(task, checks),
            )
        )
    return lines


def _image_lines(
    dense: Mapping[str, Any] | None, pruned: Mapping[str, Any] | None, checks: Sequence[Check]
) -> Iterator[Line]:
    """Metrics of images, where a model writes them; precision and recall need a reference that has images."""
    if not dense or not pruned:
        return
    protocol = pruned["protocol"]
    note = f"{protocol['samples']} images, features: {protocol['features']['kind']}"
    for key, (name, write) in IMAGE_METRICS.items():
        if dense[key] is not None and pruned[key] is not None:
            yield _line(name, dense[key], pruned[key], write, checks=checks, note=note)


def cost_lines(results: Results, checks: Sequence[Check]) -> list[Line]:
    """Speed and memory as measured, size and work as counted."""
    dense, pruned = results.benchmark["dense"], results.benchmark["pruned"]
    ratios, protocol = results.benchmark["ratios"], results.benchmark["protocol"]
    tokens = protocol["batch"] * protocol["new_tokens"]
    by_bytes = _expected(ratios["speed_up"], ratios["expected_by_bytes"], "the bytes read for a token")
    by_flops = _expected(ratios["prefill_speed_up"], ratios["expected_by_flops"], "the operations")

    def counted(metric: str, key: str, kind: BudgetKind, note: str = "") -> Line:
        return _line(metric, dense[key], pruned[key], lambda value: readable(value, kind), checks=checks, note=note)

    return [
        Line(
            "Tokens per second",
            _speed(dense, tokens),
            _speed(pruned, tokens),
            Cell(_times(ratios["speed_up"])),
            by_bytes,
            _broken("Tokens per second", checks),
        ),
        counted("Time to first token", "seconds_to_first_token", "latency", "the prompt, and one token"),
        counted("Time per further token", "seconds_per_token", "latency"),
        _line(
            "Prefill, tokens per second",
            dense["prefill_tokens_per_second"],
            pruned["prefill_tokens_per_second"],
            "{:,.0f}".format,
            checks=checks,
            note=by_flops,
        ),
        counted("Peak memory", "peak_memory_bytes", "memory"),
        counted("File size", "checkpoint_bytes", "size"),
        counted("Parameters", "parameters", "parameters"),
        counted("Operations per token", "flops_per_token", "flops", "by count"),
        counted("Bytes read per token", "bytes_per_token", "memory", "by count: weights, and cached keys and values"),
        counted("Key/value cache per token", "cache_bytes_per_token", "memory", "by count"),
        counted("Key/value cache at the end", "cache_bytes", "memory", f"by count, batch {protocol['batch']}"),
    ]


@dataclass(frozen=True)
class WorkloadLine:
    """Speed at one batch size and prompt length."""

    batch: int
    prompt_length: int
    dense: Cell
    pruned: Cell
    speed_up: str
    first_token: str
    prefill_speed_up: str


def workload_lines(results: Results) -> list[WorkloadLine]:
    """Every batch size and prompt length that was measured."""
    return list(_workload_lines(results.benchmark["workloads"], results.benchmark["protocol"]["new_tokens"]))


def _workload_lines(workloads: Sequence[Mapping[str, Any]], new_tokens: int) -> Iterator[WorkloadLine]:
    for workload in workloads:
        dense, pruned = workload["dense"], workload["pruned"]
        yield WorkloadLine(
            workload["batch"],
            workload["prompt_length"],
            _speed(dense, workload["batch"] * new_tokens),
            _speed(pruned, workload["batch"] * new_tokens),
            _times(pruned["tokens_per_second"] / dense["tokens_per_second"]),
            " → ".join(readable(side["seconds_to_first_token"], "latency") for side in (dense, pruned)),
            _times(pruned["prefill_tokens_per_second"] / dense["prefill_tokens_per_second"]),
        )


def _line(
    metric: str, dense: float, pruned: float, write: Callable[[float], str], *, checks: Sequence[Check], note: str = ""
) -> Line:
    change = Cell(_times(pruned / dense))
    return Line(metric, Cell(write(dense)), Cell(write(pruned)), change, note, _broken(metric, checks))


def _broken(metric: str, checks: Sequence[Check]) -> tuple[str, ...]:
    broken = (check.criterion for check in checks if check.metric == metric and not check.criterion.passed)
    return tuple(f"{criterion.name} {criterion.limit}" for criterion in broken)


def _accuracy(figures: Mapping[str, Any]) -> Cell:
    return Cell(f"{figures['accuracy']:.1%}", f"± {100 * figures['stderr']:.1f}")


def _speed(side: Mapping[str, Any], tokens: int) -> Cell:
    """The median, and the slowest and the fastest run."""
    slowest, fastest = (tokens / pick(side["seconds"]) for pick in (max, min))
    return Cell(f"{side['tokens_per_second']:,.0f}", f"{slowest:,.0f} to {fastest:,.0f}")


def _times(ratio: float) -> str:
    return f"{ratio:.2f} ×" if abs(ratio - 1) >= 0.1 else f"{ratio:.3f} ×"


def _expected(measured: float, expected: float, reason: str) -> str:
    return f"{_times(expected)} to be expected from {reason}; measured is {measured / expected:.0%} of that"
