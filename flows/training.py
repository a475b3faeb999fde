"""What the flows that train the reference models share."""

from collections.abc import Callable
from typing import Any

from flows.environment import prepare_environment

prepare_environment()

from prefect import Task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402

from flows.server import start_server  # noqa: E402
from numprune.errors import reported  # noqa: E402
from tasks.parameters import load_parameters  # noqa: E402


def step(function: Callable[..., Any], name: str, *, retries: int = 0) -> Callable[..., Any]:
    """A Prefect task whose result is kept nowhere: what it makes are files."""
    return Task(function, name=name, cache_policy=NO_CACHE, persist_result=False, retries=retries)


def print_figures(training: Callable[[], dict[str, Any]]) -> None:
    """Runs a flow and prints the figures of the card."""
    with reported():
        load_parameters()
        start_server()()
        for name, value in training().items():
            print(f"{name}: {value}")
