"""Verify every champion of the registry, byte by byte: the nightly deployment `verify`, or `python -m flows.verify`."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.environment import prepare_environment

prepare_environment()

from prefect import flow, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402

from flows.notification import load_notifier  # noqa: E402
from flows.server import start_server  # noqa: E402
from flows.stages import Ending  # noqa: E402
from numprune.errors import NumpruneError, reported  # noqa: E402
from tasks.parameters import load_parameters  # noqa: E402

if TYPE_CHECKING:
    from mlflow import MlflowClient


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="verify@{model}")
def verify_champion(model: str, version: str) -> State[Any]:
    """Recomputes every hash of a version and compares all that is said of it."""
    from tasks.provenance.verify import verify_version
    from tasks.registry.connection import connect
    from tasks.registry.version_folder import local_folder

    parameters = load_parameters()
    client = connect(parameters.registry)
    entity = client.get_model_version(model, version)
    with tempfile.TemporaryDirectory() as target:
        folder = local_folder(client, entity, Path(target))
        found = verify_version(
            client, entity, folder, parameters.signing, signature_required=parameters.promotion.signed
        )
    if found:
        return Failed(message="\n".join([f"{model} version {version}:", *(f"  {item}" for item in found)]))
    return Completed(message=f"{model} version {version} agrees with its evidence.")


@flow(name="verify", persist_result=False)
def verify(notify: str | None = None) -> State[Any]:
    """Verifies every champion; fails if anything disagrees.

    Args:
        notify: Slug of a Prefect notification block that is told of a failure, such as `slack-webhook/team`.
    """
    from tasks.registry.connection import connect

    try:
        notifier = load_notifier(notify) if notify else None
        champions = list(_champions(connect(load_parameters().registry)))
    except NumpruneError as error:
        return Failed(name=Ending.REJECTED.value, message=str(error))
    # One that cannot even be read fails as well, and the others are still looked at.
    states = [verify_champion(model, version, return_state=True) for model, version in champions]
    failures = [state.message or str(state) for state in states if not state.is_completed()]
    if not failures:
        return Completed(message=f"{len(champions)} champion(s) verified.")
    if notifier is not None:
        notifier.notify("\n".join(failures), subject="numprune: a champion is not what its evidence says")
    return Failed(message="\n".join(failures))


def _champions(client: "MlflowClient") -> Iterator[tuple[str, str]]:
    """Versions that are champion by alias or by the log of promotions; where the two differ, both are looked at."""
    from tasks.registry.connection import all_pages
    from tasks.registry.promotion_log import CHAMPION, champion, read_promotions

    for model in all_pages(lambda token: client.search_registered_models(page_token=token)):
        of_model = (model.aliases.get(CHAMPION), champion(read_promotions(client, model.name)))
        yield from ((model.name, version) for version in dict.fromkeys(str(found) for found in of_model if found))


def main() -> int:
    """Runs the flow; returns 0, or 1 if anything disagrees."""
    with reported():
        load_parameters()
        start_server()()
        state = verify(return_state=True)
    print(state.message)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
