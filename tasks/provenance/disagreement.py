"""What a check finds."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from numprune.errors import NumpruneError


@dataclass(frozen=True)
class Disagreement:
    """Two things that should be the same and are not.

    Attributes:
        where: The file or the field.
        what: What was expected and what was found.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where} {self.what}"


def differing(where: str, found: Any, expected: Any, source: str) -> Iterator[Disagreement]:
    """Yields a disagreement unless a value is the expected one, which `source` gives."""
    if found != expected:
        yield Disagreement(where, f"is {_short(found)}, but {source} says {_short(expected)}")


def guarded(where: str, check: Callable[[], Iterable[Disagreement]]) -> list[Disagreement]:
    """All that a check finds; if what it reads is so damaged that it cannot go on, that as well."""
    found: list[Disagreement] = []
    try:
        found.extend(check())
    except NumpruneError as error:
        found.append(Disagreement(where, f"cannot be checked: {error}"))
    except Exception as error:  # noqa: BLE001, RUF100  # Whoever changed a file chose what it makes a parser raise.
        found.append(Disagreement(where, f"cannot be checked: it is damaged ({error!r:.200})"))
    return found


def _short(value: Any) -> str:
    if value is None:
        return "absent"
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
