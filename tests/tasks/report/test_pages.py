"""The pages as files: what stands in them, and that they need nothing else."""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from tasks.layout import REPORT, report_page
from tasks.parameters import load_parameters
from tasks.report.pages import write_pages
from tests.tasks.made_up_results import HOSTILE, LAYERS, MODEL

RUN_PLOTS = ["kept", "reconstruction", "scores", "threshold"]
SWEEP_PLOTS = [f"{MODEL}-{name}" for name in ("compensation", "memory", "size", "speed")]


class Page(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_pages_need_nothing_else(pages: list[Path]) -> None:
    for path in pages:
        page = Page(path)
        assert not [tag for tag, _ in page.elements if tag in {"script", "iframe", "object", "img"}]
        loaded = [attributes["href"] for attributes in page.all("link")]
        assert loaded == ["data:,"]
        assert not re.findall(r"@import|url\((?!#)", path.read_text(encoding="utf-8"))
        # What is linked lies in the report.
        for link in page.all("a"):
            target = link["href"]
            assert target.startswith("#") or (path.parent / target).is_file(), target


def test_pages_can_be_read_by_a_screen_reader(pages: list[Path]) -> None:
    for path in pages:
        page = Page(path)
        assert page.all("html")[0]["lang"] == "en"
        assert all(head.get("scope") for head in page.all("th"))
        assert all(plot["role"] == "img" and len(plot["aria-label"]) > 40 for plot in page.all("svg"))
        names = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
        assert len(names) == len(set(names))
        labels = [attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes]
        assert set(labels) <= set(names)
        references = re.findall(r'(?:url\(|xlink:href=")#([^)"]+)', path.read_text(encoding="utf-8"))
        assert set(references) <= set(names)


def test_every_plot_is_drawn_and_its_data_written(pages: list[Path]) -> None:
    for page, folder, names in (
        (pages[0], "sweep", SWEEP_PLOTS),
        (pages[1], f"{MODEL}-0.5", RUN_PLOTS),
    ):
        written = sorted((REPORT / "plots" / folder).iterdir())
        assert [path.name for path in written] == [f"{name}.{kind}" for name in names for kind in ("csv", "png")]
        assert len(Page(page).all("svg")) == len(names)
        for path in written:
            if path.suffix == ".png":
                assert path.read_bytes().startswith(b"\x89PNG")
    with (REPORT / "plots" / f"{MODEL}-0.5" / "kept.csv").open(encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["layer", "units", "dense", "kept", "share kept"]
    assert rows[0] == ["0", "heads", "2", "1", "0.5"]
    assert rows[-1] == ["2", "channels", "80", "40", "0.5"]
    assert len(rows) == 2 * LAYERS


def test_text_of_the_models_is_no_markup(pages: list[Path]) -> None:
    assert Page(pages[1]).text.count(HOSTILE) == 3


def test_plots_take_the_colours_of_the_page(pages: list[Path]) -> None:
    svg = pages[1].read_text(encoding="utf-8").split("<svg")[1].split("</svg>")[0]
    assert "var(--blue)" in svg
    assert re.findall(r"(?:fill|stroke): #[0-9a-f]+", svg) == []


def test_same_results_give_the_same_pages(pages: list[Path]) -> None:
    files = [*pages, *(REPORT / "plots").rglob("*.png"), *(REPORT / "plots").rglob("*.csv")]
    before = [path.read_bytes() for path in files]
    write_pages(load_parameters())
    assert [path.read_bytes() for path in files] == before


def test_limits_and_locked_files_stand_on_the_page(budgets: list[str]) -> None:
    content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    content["promotion"] |= {"max_perplexity_ratio": 1.02, "max_accuracy_drop": 0.0}
    Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    folder = f"artifacts/{MODEL}"
    stages = {
        f"calibrate@{MODEL}": {
            "deps": [{"path": f"models/{MODEL}", "md5": "1" * 32 + ".dir", "size": 5}],
            "outs": [{"path": f"{folder}/calibration.safetensors", "md5": "2" * 32, "size": 6}],
        },
        f"prune@{MODEL}-0.2": {"outs": [{"path": f"{folder}/0.2/plan.json", "md5": "3" * 32, "size": 7}]},
    }
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}), encoding="utf-8")
    write_pages(load_parameters())
    half, fifth = (Page(report_page(MODEL, budget)).text for budget in budgets)
    assert "Beyond 1 of 3 stated limits" in half
    assert "beyond the limit: perplexity ratio at most 1.02" in half
    assert "Within all 3 stated limits" in fifth
    assert [digit * 32 in fifth for digit in "123"] == [True, True, True]
    assert [digit * 32 in half for digit in "123"] == [True, True, False]
