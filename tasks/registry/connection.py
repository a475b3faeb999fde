"""The connection to MLflow, which keeps the registered versions."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numprune.errors import NumpruneError
from tasks.parameters import PARAMETERS_FILE, Registry, load_parameters
from tasks.registry.database import make_database

if TYPE_CHECKING:
    from mlflow import MlflowClient

ADDRESS_VARIABLE = "MLFLOW_TRACKING_URI"


def connect(registry: Registry) -> "MlflowClient":
    """Opens the tracking server or database, whose folder is created if needed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    import mlflow
    from mlflow import MlflowClient

    make_database(registry.tracking_uri)
    # The registry looks a version's model up by the tracking URI of the process, not by the client's.
    mlflow.set_tracking_uri(registry.tracking_uri)
    return MlflowClient(tracking_uri=registry.tracking_uri, registry_uri=registry.tracking_uri)


def find_registry(address: str | None = None) -> Registry:
    """The registry at an address; without one, that of params.yaml or of the variable MLFLOW_TRACKING_URI.

    Raises:
        NumpruneError: If none of the three says where the registry is, or params.yaml is wrong.
    """
    configured = load_parameters().registry if PARAMETERS_FILE.exists() else None
    if address is None and configured is not None:
        return configured
    address = address or os.environ.get(ADDRESS_VARIABLE)
    if not address:
        raise NumpruneError(
            f"Where is the registry? Give --registry URI or set {ADDRESS_VARIABLE}, to http://mlflow.example:5000 for "
            f"example; there is no {PARAMETERS_FILE} in {Path.cwd()}."
        )
    return (configured or Registry()).model_copy(update={"tracking_uri": address})


def all_pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """Everything that a search of MLflow finds, which it gives in pages; `search` takes the token of a page."""
    token = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return
