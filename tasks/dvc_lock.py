"""What `dvc.lock` says: the stages, with the hash of everything they read and wrote."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from numprune.errors import NumpruneError
from tasks.layout import benchmark_file, checkpoint_folder, evaluation_file, plan_file


@dataclass(frozen=True)
class LockedStage:
    """One stage of `dvc.lock`; hashes by path, those of folders end in `.dir`."""

    name: str
    dependencies: Mapping[str, str]
    outputs: Mapping[str, str]
    parameters: Mapping[str, Any]
    """By their key in `params.yaml`, such as `recipe.preset`."""


def read_lock(text: str) -> dict[str, LockedStage]:
    """Reads the text of a `dvc.lock`.

    Raises:
        NumpruneError: If it is no `dvc.lock`.
    """
    try:
        stages = yaml.safe_load(text)["stages"]
        return {
            name: LockedStage(
                name,
                _hashes(stage.get("deps", [])),
                _hashes(stage.get("outs", [])),
                {key: value for keys in stage.get("params", {}).values() for key, value in keys.items()},
            )
            for name, stage in stages.items()
        }
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise NumpruneError(f"dvc.lock cannot be read: {error!r}") from None


def stages_behind(stages: Mapping[str, LockedStage], outputs: Iterable[str]) -> dict[str, LockedStage]:
    """The stages that made some outputs, and those that made what they read, and so on; in the order of `dvc.lock`."""
    maker = {path: stage for stage in stages.values() for path in stage.outputs}
    found: set[str] = set()
    wanted = [maker[path] for path in outputs if path in maker]
    while wanted:
        stage = wanted.pop()
        if stage.name not in found:
            found.add(stage.name)
            wanted.extend(maker[path] for path in stage.dependencies if path in maker)
    return {name: stage for name, stage in stages.items() if name in found}


def version_outputs(model: str, budget: str) -> list[str]:
    """The paths in `dvc.lock` of what makes up a version."""
    paths = (
        checkpoint_folder(model, budget),
        plan_file(model, budget),
        evaluation_file(model, budget),
        evaluation_file(model, None),
        benchmark_file(model, budget),
    )
    return [path.as_posix() for path in paths]


def _hashes(entries: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {entry["path"]: entry["md5"] for entry in entries}
