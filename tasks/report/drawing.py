"""How a plot becomes files and a part of a page.

A plot is drawn once, in the colours of the light page. In the page its colours are variables of the style sheet, which
gives them other values in the dark; its text stays text, in the page's font.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

# Those of series are of Okabe and Ito, told apart by every kind of colour vision.
PAPER = "#ffffff"
INK = "#1b1f24"
MUTED = "#59636e"
RULE = "#d1d9e0"
BLUE = "#0072b2"
ORANGE = "#c04e00"
_VARIABLES = {
    PAPER: "paper",
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    BLUE: "blue",
    ORANGE: "orange",
}

# Inches; a phone shows this width at about its true size.
WIDTH = 4.6


@dataclass(frozen=True)
class Plot:
    """A plot with the data it shows.

    Attributes:
        name: Of its files.
        title: Heading.
        description: What it shows, for those who cannot see it.
        caption: How to read it.
        figure: As drawn.
        columns: Headings of the data.
        rows: The data.
    """

    name: str
    title: str
    description: str
    caption: str
    figure: Figure
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]

    def save(self, folder: Path) -> None:
        """Writes the plot as PNG and its data as CSV."""
        folder.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(folder / f"{self.name}.png", dpi=200, facecolor=PAPER, metadata={"Software": None})
        with (folder / f"{self.name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([self.columns, *self.rows])

    @property
    def svg(self) -> Markup:
        """The plot as an element of a page."""
        written = StringIO()
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        _, _, attributes = written.getvalue().partition("<svg ")
        # Without a size of its own it is as wide as the page lets it be.
        text = "<svg " + re.sub(r'\b(?:width|height)="[^"]*pt" ?', "", attributes, count=2)
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        # Several plots stand in one page.
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(url\(|href=")#', rf"\1#{self.name}-", text)
        for colour, variable in _VARIABLES.items():
            text = text.replace(colour, f"var(--{variable})")
        label = str(Markup.escape(self.description))
        return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))  # noqa: S704


@contextmanager
def figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure in the report's style and its axes, to draw on.

    Args:
        height: In inches.
        rows: Of axes.
        columns: Of axes.
        options: Of `Figure.subplots`.
    """
    style: Any = {
        "font.size": 10.5,
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.titlesize": "medium",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
    }
    with mpl.rc_context(style):
        drawn = Figure(figsize=(WIDTH, height), layout="constrained")
        yield drawn, drawn.subplots(rows, columns, **options)
