"""Progress of long work: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from numprune.ranks import is_first

Item = TypeVar("Item")
_SECONDS_BETWEEN_LINES = 2.0


class Watch(Protocol):
    """Something that items pass through, such as `track`."""

    def __call__(self, items: Iterable[Item], total: int, title: str, /) -> Iterator[Item]:
        """Passes items through."""


def silent(items: Iterable[Item], _total: int, _title: str) -> Iterator[Item]:
    """Passes items through and shows nothing."""
    yield from items


def track(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    """Passes items through and shows how many of them are done and how long the rest will take.

    On a terminal a bar is drawn; elsewhere, in logs and pipelines, lines such as `capture 3/32, 41 s left` are printed.
    """
    if not is_first():
        yield from items
        return
    if sys.stderr.isatty():
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as progress:
            bar = progress.add_task(title, total=total)
            for item in items:
                progress.advance(bar)
                yield item
        return
    start = printed = time.monotonic()
    for done, item in enumerate(items, 1):
        now = time.monotonic()
        if done == total or now - printed >= _SECONDS_BETWEEN_LINES:
            printed = now
            print(
                f"{title} {done}/{total}, {(now - start) / done * (total - done):.0f} s left",
                file=sys.stderr,
                flush=True,
            )
        yield item
