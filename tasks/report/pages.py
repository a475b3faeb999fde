"""The pages: one of every run, one of all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from numprune.budget import readable
from numprune.files import replace_on_success
from numprune.recipe import recipe_name
from tasks.layout import PLOTS, REPORT, report_page
from tasks.parameters import Parameters
from tasks.report.drawing import Plot
from tasks.report.limits import Check, check_limits
from tasks.report.lineage import library_command, locked_files, pipeline_command
from tasks.report.plots import run_plots, sweep_plots
from tasks.report.published import published
from tasks.report.results import Results, read_results
from tasks.report.sentences import sentences
from tasks.report.table import cost_lines, quality_lines, workload_lines


@dataclass(frozen=True)
class _Run:
    """A run on the page of all of them."""

    results: Results
    checks: Sequence[Check]

    @property
    def page(self) -> str:
        return report_page(self.results.model, self.results.budget).relative_to(REPORT).as_posix()

    @property
    def broken(self) -> list[Check]:
        return [check for check in self.checks if not check.criterion.passed]


def write_pages(parameters: Parameters) -> None:
    """Writes `report/index.html`, a page of every run in `report/runs/`, and all plots and their data."""
    environment = _environment()
    models: dict[str, list[_Run]] = {}
    with replace_on_success(PLOTS) as plots, replace_on_success(report_page("x", "y").parent) as runs:
        runs.mkdir()
        for model in parameters.models:
            models[model] = []
            for budget in parameters.budgets:
                results = read_results(model, budget, parameters.workload)
                run = _Run(results, check_limits(results.documents, parameters.promotion))
                models[model].append(run)
                page = _run_page(environment, run, parameters, plots)
                (runs / Path(run.page).name).write_text(page, encoding="utf-8")
            models[model].sort(key=lambda run: run.results.plan.achieved_ratio)
        index = _sweep_page(environment, models, plots)
    with replace_on_success(report_page()) as path:
        path.write_text(index, encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tasks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["readable"] = readable
    environment.filters["cell"] = _cell
    environment.filters["breakable"] = _breakable
    return environment


def _run_page(environment: Environment, run: _Run, parameters: Parameters, plots: Path) -> str:
    results = run.results
    drawn = _saved(run_plots(results), plots / results.name)
    return environment.get_template("run.html").render(
        results=results,
        run=run,
        sentences=sentences(results),
        sections={"Quality": quality_lines(results, run.checks), "Cost": cost_lines(results, run.checks)},
        workloads=workload_lines(results),
        published=published(results),
        plots=drawn,
        plots_folder=f"../{PLOTS.name}/{results.name}",
        recipe=_flat(asdict(results.recipe)),
        recipe_name=recipe_name(results.recipe),
        files=locked_files(results.model, results.budget),
        pipeline_command=pipeline_command(results.model, results.budget),
        library_command=library_command(results, parameters),
        protocols={
            "evaluation": _flat(results.pruned["protocol"]) | results.timing,
            "benchmark": _flat(results.benchmark["protocol"]),
            "calibration": parameters.calibration.model_dump(),
        },
    )


def _sweep_page(environment: Environment, models: Mapping[str, Sequence[_Run]], plots: Path) -> str:
    drawn = {
        model: _saved(sweep_plots(model, [run.results for run in runs]), plots / "sweep")
        for model, runs in models.items()
    }
    return environment.get_template("sweep.html").render(
        models=models,
        plots=drawn,
        plots_folder=f"{PLOTS.name}/sweep",
        published=[said for run in next(iter(models.values())) if (said := published(run.results))],
    )


def _saved(plots: Sequence[Plot], folder: Path) -> list[Plot]:
    for plot in plots:
        plot.save(folder)
    return list(plots)


def _cell(value: Any) -> str:
    """A cell of a table of plotted data."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _breakable(name: str) -> Markup:
    """A name such as arc_challenge that a narrow column may break after each part."""
    return Markup("_<wbr>").join(name.split("_"))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
