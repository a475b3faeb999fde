"""What a run did, in a sentence and in a table of dense against pruned."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from flows.stages import Ending
from tasks.publish import Publication
from tasks.summary import COLUMNS, Row, cells

Column = Mapping[tuple[str, str], str]
"""Cells by model and budget."""


@dataclass(frozen=True)
class Report:
    """What a run of the flow did."""

    rows: list[Row]
    publications: list[Publication]
    endings: Counter[str]

    @property
    def sentence(self) -> str:
        """How many stages ran, and how many versions are new."""
        new = sum(publication.is_new for publication in self.publications)
        return f"{counted(self.endings)}; {new} of {len(self.publications)} versions newly published."

    @property
    def versions(self) -> Column:
        """The column of registered versions."""
        return {(p.model, p.budget): str(p.version) for p in self.publications}


def counted(endings: Counter[str]) -> str:
    """How many stages ran, and how many did not have to."""
    ran, unchanged, restored = (endings[e.value] for e in (Ending.COMPLETED, Ending.UNCHANGED, Ending.RESTORED))
    said = f"{ran} {'stage' if ran == 1 else 'stages'} run, {unchanged} unchanged"
    return f"{said}, {restored} restored from DVC's cache" if restored else said


def print_table(rows: Sequence[Row], sentence: str, further: Mapping[str, Column]) -> list[dict[str, str]]:
    """Prints dense against pruned; returns the lines of the table.

    Args:
        rows: Of the table.
        sentence: What the run did.
        further: Columns that only this run has.
    """
    columns = (*COLUMNS, *further)
    lines = [
        (*cells(row), *(column.get((row["model"], row["budget"] or ""), "") for column in further.values()))
        for row in rows
    ]
    drawn = Table(title="dense against pruned")
    for column in columns:
        drawn.add_column(column.replace(" ", "\n"), justify="left" if column == "model" else "right", no_wrap=True)
    for line in lines:
        drawn.add_row(*line)
    # Where the output is no terminal, its width is unknown, and a table cut at 80 columns cannot be read.
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(drawn)
    console.print(sentence, highlight=False)
    return [dict(zip(columns, line, strict=True)) for line in lines]
