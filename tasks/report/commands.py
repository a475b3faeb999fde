"""The command `numprune report`."""

import webbrowser
from typing import Annotated

import typer

from numprune.errors import NumpruneError, reported
from tasks.layout import report_page

app = typer.Typer()


@app.command("report")
def show_report(
    model: Annotated[str | None, typer.Argument(help="As in params.yaml; without it, the page of all runs.")] = None,
    budget: Annotated[str | None, typer.Argument(help="As in params.yaml.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Says where the page of a finished run lies, and opens it.

    Example:
        numprune report reference-llama 0.2 --open
    """
    with reported(debug=debug):
        if (model is None) != (budget is None):
            raise NumpruneError("Give a model and a budget, or neither for the page of all runs.")
        page = report_page(model, budget).absolute()
        if not page.is_file():
            raise NumpruneError(f"{page} is not there: run `make demo` or `dvc repro summary` first.")
        typer.echo(str(page))
        if open_page:
            webbrowser.open(page.as_uri())
