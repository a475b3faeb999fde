"""Files that are read before they are needed and written after they are made, while blocks are computed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

from numprune.ranks import meet

T = TypeVar("T")


def read_ahead(read: Callable[[int], T], indices: Iterable[int]) -> Iterator[T]:
    """Yields what is read for one index after the other; while one is worked with, a thread reads the next."""
    ahead: deque[Future[T]] = deque()  # Nothing else may hold on to what the caller lets go of.
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        for index in indices:
            ahead.append(reader.submit(read, index))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class WriteBehind:
    """A thread that writes one file while the caller computes the next. Leaving the context waits for it.

    Of several ranks, which have the same to write, the first one does: it alone begins, and all of them settle.
    """

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, "write-behind")
        self._begun: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.shutdown()

    def begin(self, write: Callable[[], None]) -> None:
        """Begins to write; what was begun before is settled."""
        assert self._begun is None
        self._begun = self._writer.submit(write)

    def settle(self) -> None:
        """Waits until what was begun is written, on every rank.

        Raises:
            Exception: What writing raised.
        """
        if self._begun:
            begun, self._begun = self._begun, None
            begun.result()
        meet()
