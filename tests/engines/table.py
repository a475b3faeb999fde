"""The table of README.md, made of the results that `make test-engines` leaves in docs/engines.json."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "docs/engines.json", ROOT / "README.md"
START, END = "<!-- From docs/engines.json, by make test-engines. -->\n", "<!-- End of the table. -->\n"
ENGINES = ("transformers", "llama.cpp", "vLLM")
SHAPES = {"uniform": "equal widths", "ragged": "different widths"}


def table(results: dict[str, dict[str, str]]) -> str:
    """The results in Markdown: a row a family, a column an engine and shape; empty where nothing was tried."""
    titles = [f"{engine}, {name}" for engine in ENGINES for name in SHAPES.values()]
    lines = [f"| family | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for family, found in results.items():
        cells = [found.get(f"{engine} {shape}", "") for engine in ENGINES for shape in SHAPES]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def filled(page: str) -> str:
    """A page with the table of the committed results in its place."""
    before, rest = page.split(START)
    after = rest.split(END)[1]
    return before + START + table(json.loads(RESULTS.read_text(encoding="utf-8"))) + END + after


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    if "--write" in sys.argv:
        PAGE.write_text(filled(text), encoding="utf-8")
    elif filled(text) != text:
        sys.exit("README.md has another table than docs/engines.json: run `make test-engines`.")
