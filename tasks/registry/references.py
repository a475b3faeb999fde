"""How people name a version: MODEL, MODEL@alias or MODEL/3."""

import re
from typing import TYPE_CHECKING

from numprune.errors import NumpruneError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_FORM = re.compile(r"(?:models:/)?(?P<model>[\w.-]+)(?:@(?P<alias>[\w-]+)|/(?P<version>[0-9]+))?")


def resolve(client: "MlflowClient", text: str, default: str) -> "ModelVersion":
    """The version that a text names.

    Args:
        client: Of the registry.
        text: MODEL@alias or MODEL/3; MODEL alone stands for MODEL@default.
        default: The alias that is meant where none is given.

    Raises:
        NumpruneError: If the text has another form, or there is no such model, alias or version.
    """
    from mlflow.exceptions import MlflowException

    match = _FORM.fullmatch(text)
    if match is None:
        raise NumpruneError(f"{text!r} names no version: write MODEL, MODEL@alias or MODEL/3.")
    model, alias = match["model"], match["alias"] or default
    try:
        aliases = client.get_registered_model(model).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise NumpruneError(f"The registry has no model {model!r}: `numprune versions` lists what it has.") from None
    number = match["version"] or aliases.get(alias)
    if number is None:
        known = ", ".join(sorted(aliases)) or "none"
        raise NumpruneError(f"{model} has no version with the alias {alias!r}; its aliases are: {known}.")
    return get_version(client, model, int(number))


def get_version(client: "MlflowClient", model: str, number: int) -> "ModelVersion":
    """One version of a model.

    Raises:
        NumpruneError: If there is none of this number, or it was deleted.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(model, str(number))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise NumpruneError(f"{model} has no version {number}: `numprune versions {model}` lists them.") from None
