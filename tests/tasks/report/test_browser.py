"""The pages in a real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tasks.report.browser import Tab, chromium, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium: apt-get install chromium")

# Of every plot: its size on the page, and how many marks have an extent and a colour of their own.
PLOTS = """
[...document.querySelectorAll("figure svg")].map(svg => {
  const place = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll("path, use, text")].filter(mark => {
    const extent = mark.getBoundingClientRect(), style = getComputedStyle(mark);
    const painted = [style.fill, style.stroke].some(paint => paint !== "none" && !paint.includes("var("));
    return extent.width + extent.height > 0 && painted && !mark.closest("defs");
  });
  return {width: place.width, height: place.height, marks: marks.length};
})
"""

# The lowest contrast of any text with what lies behind it, as WCAG counts it.
CONTRAST = """
(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
  };
  let lowest = 21;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["STYLE", "TITLE"].includes(element.tagName.toUpperCase())) continue;
    const style = getComputedStyle(element);
    const [light, dark] = [luminance(parts(element.closest("svg") ? style.fill : style.color)),
      luminance(behind(element))].sort((a, b) => b - a);
    lowest = Math.min(lowest, (light + 0.05) / (dark + 0.05));
  }
  return lowest;
})()
"""


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    with chromium(tmp_path / "profile") as tab:
        yield tab


def test_pages_open_without_errors_wide_and_narrow_light_and_dark(tab: Tab, pages: list[Path]) -> None:
    for page, plots in zip(pages, (4, 4, 4), strict=True):
        for width in (1280, 360):
            for dark in (False, True):
                tab.open(page, width=width, dark=dark)
                drawn = tab.run(PLOTS)
                assert len(drawn) == plots
                for plot in drawn:
                    assert plot["width"] > 300
                    assert plot["height"] > 150
                    assert plot["marks"] > 20
                # Only tables scroll sideways, in a frame of their own.
                assert tab.run("document.documentElement.scrollWidth") <= width
                assert tab.run(CONTRAST) >= 4.5
                assert tab.happened("Log.entryAdded") == []
                assert tab.happened("Runtime.consoleAPICalled") == []
                assert tab.happened("Runtime.exceptionThrown") == []
                asked = {event["request"]["url"] for event in tab.happened("Network.requestWillBeSent")}
                assert {url for url in asked if not url.startswith("data:")} == {page.absolute().as_uri()}


def test_errors_would_be_noticed(tab: Tab, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<img src='missing.png'><svg></svg><script>console.error(1); undefined.x</script>", "utf-8")
    tab.open(page)
    assert tab.happened("Log.entryAdded")
    assert tab.happened("Runtime.consoleAPICalled")
    assert tab.happened("Runtime.exceptionThrown")


def test_page_is_reached_by_keyboard(tab: Tab, pages: list[Path]) -> None:
    tab.open(pages[1])
    reached = []
    while not reached or reached[-1] != "BODY":
        for kind in ("keyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(tab.run("document.activeElement.tagName"))
        # Whatever has the focus shows it.
        assert reached[-1] == "BODY" or tab.run("getComputedStyle(document.activeElement).outlineWidth") == "3px"
        assert len(reached) < 50
    # The link past the header, the one to all runs, a frame for each table, all that unfolds, the commands.
    assert reached == ["A", "A", *["DIV"] * 2, *["SUMMARY"] * 5, *["PRE"] * 2, "BODY"]
