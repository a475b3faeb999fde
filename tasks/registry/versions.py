"""What the registry holds: models, their versions, and what they are."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from numprune.errors import NumpruneError
from tasks.registry.connection import all_pages
from tasks.registry.promotion_log import LOG

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a model.

    Attributes:
        model: The registered model.
        number: Of the version.
        aliases: That point at it.
        tags: What it says of its origin and its figures.
        created: In milliseconds since 1970, UTC.
    """

    model: str
    number: int
    aliases: tuple[str, ...]
    tags: "Mapping[str, str]"
    created: int


def read_versions(client: "MlflowClient", model: str | None = None) -> list[RegisteredVersion]:
    """The versions of one model, or of all, the newest of each model first.

    Raises:
        NumpruneError: If there is no such model.
    """
    models = {found.name: found.aliases for found in _registered_models(client) if found.name != LOG}
    if model is not None and model not in models:
        raise NumpruneError(f"The registry has no model {model!r}; it has: {', '.join(sorted(models)) or 'none'}.")
    return [
        version for name in sorted(models) if model in {None, name} for version in _versions(client, name, models[name])
    ]


def _registered_models(client: "MlflowClient") -> "Iterator[RegisteredModel]":
    return all_pages(lambda token: client.search_registered_models(page_token=token))


def _versions(client: "MlflowClient", model: str, aliases: "Mapping[str, str]") -> list[RegisteredVersion]:
    found = all_pages(lambda token: client.search_model_versions(f"name = '{model}'", page_token=token))
    return [
        RegisteredVersion(
            model=model,
            number=int(version.version),
            aliases=tuple(sorted(alias for alias, number in aliases.items() if int(number) == int(version.version))),
            tags=version.tags,
            created=version.creation_timestamp,
        )
        for version in sorted(found, key=lambda version: -int(version.version))
    ]
