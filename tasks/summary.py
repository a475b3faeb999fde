"""Sum up dense against pruned: a table, the same as JSON, a picture of perplexity, and the pages of the report."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from numprune.files import replace_on_success
from tasks.layout import REPORT, benchmark_file, evaluation_file, plan_file
from tasks.parameters import Parameters, Promotion, load_parameters
from tasks.report.limits import check_limits
from tasks.step import run_step


class Row(TypedDict):
    """One model, dense or pruned to one budget."""

    model: str
    budget: str | None
    """As requested; None: dense."""
    removed: float
    """Share of the attention and MLP parameters that really went."""
    parameters: int
    checkpoint_bytes: int
    perplexity: float
    perplexity_without_compensation: float | None
    texts: dict[str, float]
    """Perplexities on further texts."""
    tasks: dict[str, Any]
    """Accuracies, as in the evaluation file."""
    images: dict[str, Any] | None
    """Metrics of images, as in the evaluation file; None: the model writes text."""
    tokens_per_second: float
    speed_up: float
    """Tokens per second over those of the dense model in the same run."""
    peak_memory_bytes: int
    beyond: list[str]
    """The limits of `promotion` that it does not keep."""


COLUMNS = (
    "model",
    "removed",
    "parameters",
    "file size",
    "perplexity",
    "without compensation",
    "accuracy",
    "tokens/s",
    "speed-up",
    "peak memory",
    "beyond limits",
)


def summarise() -> None:
    """Writes `report/summary.json`, `report/summary.md`, `report/perplexity.png` and the pages, from all results."""
    # The flow imports this module for its table alone.
    from tasks.report.pages import write_pages

    parameters = load_parameters()
    rows = all_rows(parameters)
    with replace_on_success(REPORT / "summary.json") as path:
        path.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
    with replace_on_success(REPORT / "summary.md") as path:
        path.write_text(_markdown(rows), encoding="utf-8")
    with replace_on_success(REPORT / "perplexity.png") as path:
        draw(rows, path)
    write_pages(parameters)


def all_rows(parameters: Parameters) -> list[Row]:
    """The rows of every model."""
    return [row for model in parameters.models for row in read_rows(model, parameters.budgets, parameters.promotion)]


def read_rows(model: str, budgets: Sequence[str], promotion: Promotion) -> list[Row]:
    """The dense model, then each budget, by the share removed; `promotion` has the limits."""
    dense = _read(evaluation_file(model, None))
    rows: list[Row] = []
    for budget in budgets:
        plan, evaluation, benchmark = (
            _read(file(model, budget)) for file in (plan_file, evaluation_file, benchmark_file)
        )
        if not rows:
            # Each benchmark measures the dense model again; one of them stands for it.
            rows.append(_row(model, None, 0.0, benchmark=benchmark, evaluation=dense, beyond=[]))
        documents = {"plan.json": plan, "evaluation.json": evaluation, "benchmark.json": benchmark}
        checks = check_limits(documents | {"dense/evaluation.json": dense}, promotion)
        beyond = [check.criterion.name for check in checks if not check.criterion.passed]
        removed = plan["achieved_ratio"]
        rows.append(_row(model, budget, removed, benchmark=benchmark, evaluation=evaluation, beyond=beyond))
    return sorted(rows, key=lambda row: row["removed"])


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of `COLUMNS`."""
    without = row["perplexity_without_compensation"]
    return (
        row["model"] if row["budget"] is None else f"{row['model']} {row['budget']}",
        "dense" if row["budget"] is None else f"{row['removed']:.1%}",
        f"{row['parameters'] / 1e6:,.2f} M",
        f"{row['checkpoint_bytes'] / 1e6:,.1f} MB",
        f"{row['perplexity']:.2f}",
        "" if without is None else f"{without:.2f}",
        f"{fmean(task['accuracy'] for task in row['tasks'].values()):.1%}" if row["tasks"] else "",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['speed_up']:.2f} x",
        f"{row['peak_memory_bytes'] / 1e6:,.0f} MB",
        ", ".join(row["beyond"]),
    )


def draw(rows: Iterable[Row], path: Path) -> None:
    """Draws perplexity against the share removed, one panel a model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    # Colours of Okabe and Ito, told apart by every kind of colour vision; marks and dashes differ as well.
    blue, orange, grey = "#0072B2", "#D55E00", "#555555"
    figure, panels = pyplot.subplots(
        1, len(by_model), figsize=(6.4 * len(by_model), 4.2), squeeze=False, layout="constrained"
    )
    for panel, (model, (dense, *pruned)) in zip(panels[0], by_model.items(), strict=True):
        removed = [0.0, *(100 * row["removed"] for row in pruned)]
        compensated = [dense["perplexity"], *(row["perplexity"] for row in pruned)]
        raw = [dense["perplexity"], *(row["perplexity_without_compensation"] or float("nan") for row in pruned)]
        panel.plot(removed, raw, color=orange, marker="s", linestyle="--", label="without compensation")
        panel.plot(removed, compensated, color=blue, marker="o", label="with compensation")
        panel.axhline(dense["perplexity"], color=grey, linestyle=":", label="dense")
        for values, colour, offset in ((compensated, blue, -18), (raw, orange, 10)):
            for x, y in zip(removed[1:], values[1:], strict=True):
                panel.annotate(
                    f"{y:.1f}",
                    (x, y),
                    textcoords="offset points",
                    xytext=(0, offset),
                    ha="center",
                    color=colour,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                )
        panel.set_title(model)
        panel.set_xlabel("attention and MLP parameters removed (%)")
        panel.set_ylabel("perplexity (lower is better)")
        panel.margins(x=0.08, y=0.15)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def _row(
    model: str,
    budget: str | None,
    removed: float,
    *,
    benchmark: dict[str, Any],
    evaluation: dict[str, Any],
    beyond: list[str],
) -> Row:
    cost = benchmark["dense" if budget is None else "pruned"]
    return Row(
        model=model,
        budget=budget,
        removed=removed,
        parameters=cost["parameters"],
        checkpoint_bytes=cost["checkpoint_bytes"],
        perplexity=evaluation["perplexity"],
        perplexity_without_compensation=evaluation.get("perplexity_without_compensation"),
        texts={name: text["perplexity"] for name, text in evaluation["texts"].items()},
        tasks=evaluation["tasks"],
        images=evaluation.get("images"),
        tokens_per_second=cost["tokens_per_second"],
        speed_up=cost["tokens_per_second"] / benchmark["dense"]["tokens_per_second"],
        peak_memory_bytes=cost["peak_memory_bytes"],
        beyond=beyond,
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _markdown(rows: Sequence[Row]) -> str:
    tables = [_table(COLUMNS, [cells(row) for row in rows])]
    if texts := tuple(rows[0]["texts"]):
        lines = [(cells(row)[0], *(f"{perplexity:.2f}" for perplexity in row["texts"].values())) for row in rows]
        tables.append(_table(("perplexity", *texts), lines))
    for names in dict.fromkeys(tuple(row["tasks"]) for row in rows if row["tasks"]):
        lines = [
            (cells(row)[0], *map(_accuracy, row["tasks"].values())) for row in rows if tuple(row["tasks"]) == names
        ]
        tables.append(_table(("accuracy", *names), lines))
    if drawn := [row for row in rows if row["images"]]:
        tables.append(image_table(drawn))
    return "\n".join(tables)


def image_table(rows: Sequence[Row]) -> str:
    """Metrics of images, one line a model."""
    from tasks.report.table import IMAGE_METRICS

    return _table(
        ("images", "removed", *(name for name, _ in IMAGE_METRICS.values())),
        [(*cells(row)[:2], *_image_cells(row["images"] or {})) for row in rows],
    )


def _image_cells(metrics: Mapping[str, Any]) -> list[str]:
    from tasks.report.table import IMAGE_METRICS

    return ["" if metrics[key] is None else write(metrics[key]) for key, (_, write) in IMAGE_METRICS.items()]


def _accuracy(task: Mapping[str, Any]) -> str:
    """The dense model's with its standard error, a pruned one's with the 95 % interval of what it differs by."""
    if "against_dense" not in task:
        return f"{task['accuracy']:.1%} ± {task['stderr']:.1%}"
    against = task["against_dense"]
    return f"{task['accuracy']:.1%} ({against['low']:+.1%} to {against['high']:+.1%})"


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    header = f"| {' | '.join(columns)} |\n|{'---|' * 2}{'---:|' * (len(columns) - 2)}\n"
    return header + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    run_step(summarise)
