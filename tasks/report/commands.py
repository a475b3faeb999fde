"""The command `numprune report`."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from numprune.errors import NumpruneError, reported
from tasks.layout import REPORT, SWEEP_REPORT, report_page

app = typer.Typer()


@app.command("report")
def show_report(
    run: Annotated[
        str | None,
        typer.Argument(help="Model and budget, as in reference-llama-0.2, or sweep; without it, the page of all runs."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Says where the page of a finished run lies, and opens it.

    Examples:
        numprune report reference-llama-0.2 --open

        numprune report sweep --open
    """
    with reported(debug=debug):
        page = _page(run).absolute()
        typer.echo(str(page))
        if open_page:
            webbrowser.open(page.as_uri())


def _page(run: str | None) -> Path:
    reports = (REPORT, SWEEP_REPORT)
    pages = {"sweep": SWEEP_REPORT / "index.html"}
    pages |= {page.stem: page for report in reversed(reports) for page in sorted(report.glob("runs/*.html"))}
    page = report_page() if run is None else pages.get(run)
    if page is not None and page.is_file():
        return page
    there = [name for name, path in pages.items() if path.is_file()]
    if run is None or not there:
        raise NumpruneError(f"{report_page().absolute()} is not there: run `make demo` or `make sweep` first.")
    raise NumpruneError(f"There is no page of {run}: there are pages of {', '.join(there)}.")
