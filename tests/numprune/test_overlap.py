import gc
import threading
import weakref

import pytest
import torch

from numprune.overlap import WriteBehind, read_ahead

SECONDS = 30.0


def test_the_next_is_read_while_one_is_worked_with():
    begun = [threading.Event() for _ in range(4)]

    def read(index):
        begun[index].set()
        return index

    found = []
    for index in read_ahead(read, range(4)):
        assert all(event.wait(SECONDS) for event in begun[: index + 2])
        assert not any(event.is_set() for event in begun[index + 2 :])
        found.append(index)
    assert found == [0, 1, 2, 3]


def test_nothing_is_held_that_the_caller_let_go_of():
    read = read_ahead(lambda _index: torch.zeros(1), range(3))
    for _ in range(3):
        tensor = next(read)
        held = weakref.ref(tensor)
        del tensor
        gc.collect()
        assert held() is None


def test_what_reading_raises_comes_in_its_turn():
    def read(index):
        if index == 1:
            raise OSError("gone")
        return index

    found = read_ahead(read, range(3))
    assert next(found) == 0
    with pytest.raises(OSError, match="gone"):
        next(found)


def test_the_caller_goes_on_while_a_file_is_written():
    go_on, written = threading.Event(), []

    def write():
        assert go_on.wait(SECONDS)
        written.append(True)

    with WriteBehind() as writer:
        writer.begin(write)
        assert not written
        go_on.set()
        writer.settle()
        assert written


def test_leaving_waits_even_after_an_error():
    written = []

    def interrupted():
        with WriteBehind() as writer:
            writer.begin(lambda: written.append(True))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert written


def test_what_writing_raises_is_raised_once_by_settling():
    def write():
        raise OSError("full")

    with WriteBehind() as writer:
        writer.begin(write)
        with pytest.raises(OSError, match="full"):
            writer.settle()
        writer.settle()
