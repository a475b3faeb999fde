"""Create a Prefect concurrency limit, or set it anew: `python -m flows.limits NAME SLOTS`, when deploying."""

from typing import Annotated

import typer

from flows.environment import prepare_environment
from tasks.step import run_step


def create_limit(name: str, slots: Annotated[int, typer.Argument(min=1)]) -> None:
    """Lets `slots` stages at a time use what the limit `name` stands for, on all workers together."""
    prepare_environment()
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(name, slots)
    print(f"{name}: {slots}")


if __name__ == "__main__":
    run_step(create_limit)
