"""A folder beside the checkout in which the pipeline runs apart from it, on the same cache and registry.

A release has a git worktree as such a folder. A sweep has one that is made of links: its code, its models and its data
are those of the checkout, its parameters and results are its own. A run that was killed leaves it in any state.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from tasks.layout import CORPUS, DIGITS, model_folder
from tasks.parameters import PARAMETERS_FILE, Parameters, Registry

LOCK_FILE = "dvc.lock"

# What the stages make, and what belongs to one checkout; everything else is linked.
_OWN = {"artifacts", "data", "models", "report", "build", LOCK_FILE, str(PARAMETERS_FILE)}


def open_workspace(folder: Path, root: Path, parameters: Parameters, changes: Mapping[str, Any]) -> None:
    """Makes a workspace of links, or mends the one that an earlier run left; results in it stay.

    Args:
        folder: Where; git must ignore it.
        root: The checkout.
        parameters: Those of the workspace, as checked.
        changes: Keys of the checkout's `params.yaml` with the values they have in the workspace.
    """
    end_orphans(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for link in (path for path in (*folder.iterdir(), *folder.glob("models/*")) if path.is_symlink()):
        link.unlink()
    for source in _linked(root, parameters):
        _link(source, folder / source.relative_to(root))
    link_inputs(parameters, folder, root)
    (folder / ".dvc").mkdir(exist_ok=True)
    (folder / ".dvc/config").write_bytes((root / ".dvc/config").read_bytes())
    # Where git ignores everything, there is nothing for DVC to tell it.
    share_cache(folder, root, no_scm=True)
    link_registry(parameters.registry, folder, root)
    write_parameters(root / PARAMETERS_FILE, folder / PARAMETERS_FILE, changes)
    mend_locks(folder)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a workspace from being used by two runs at once.

    Raises:
        NumpruneError: If another run uses it.
    """
    folder.parent.mkdir(exist_ok=True)
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=0):
            yield
    except Timeout:
        raise NumpruneError(f"Another run uses {folder}: wait for it, or end it.") from None


def _linked(root: Path, parameters: Parameters) -> Iterator[Path]:
    for path in root.iterdir():
        if path.name == ".dvcignore" or not (path.name in _OWN or path.name.startswith(".")):
            yield path
    for model in parameters.models:
        if model not in parameters.downloads:
            yield root / model_folder(model)


def link_inputs(parameters: Parameters, folder: Path, root: Path) -> None:
    """What `params.yaml` names relative to the checkout and no stage makes is there in the workspace as well."""
    evaluation, images = parameters.evaluation, parameters.images
    named = (parameters.calibration.data, evaluation.data, evaluation.tasks_folder, images.data, images.reference)
    for path in map(Path, (*named, images.features.weights)):
        made = CORPUS in path.parents or DIGITS in path.parents
        if not (path.is_absolute() or made) and (root / path).exists():
            _link(root / path, folder / path)


def _link(source: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.unlink(missing_ok=True)  # A link into nothing.
        link.symlink_to(source.resolve())


def share_cache(folder: Path, root: Path, *, no_scm: bool = False) -> None:
    """Gives a workspace the local settings of DVC, remotes and their keys among them, and the same cache."""
    from dvc.config import Config

    original = Config(str(root / ".dvc"))
    # As resolved there: a path in them counts from the folder of the file it stands in.
    settings: dict[str, Any] = original.load_one("local")
    for name, remote in original.load_one("repo")["remote"].items():
        settings["remote"].setdefault(name, {}).setdefault("url", str(remote["url"]))
    for remote in settings["remote"].values():
        for key, value in remote.items():
            remote[key] = str(value)
    settings["cache"]["dir"] = str(original.get("cache", {}).get("dir") or root.resolve() / ".dvc/cache")
    if no_scm:
        settings["core"]["no_scm"] = True
    with Config(str(folder / ".dvc")).edit("local") as local:
        local.clear()
        local.update(settings)


def link_registry(registry: Registry, folder: Path, root: Path) -> None:
    """A registry on disk is named relative to the checkout; the workspace has a link to the same."""
    uri = registry.tracking_uri
    places = [uri.removeprefix("sqlite:///")] if uri.startswith("sqlite:///") else []
    places += [] if urlsplit(registry.artifacts).scheme else [registry.artifacts]
    for place in {Path(place).parts[0] for place in places if not Path(place).is_absolute()}:
        link = folder / place
        if not link.exists():
            (root / place).mkdir(exist_ok=True)
            link.symlink_to((root / place).resolve(), target_is_directory=True)


def write_parameters(source: Path, target: Path, changes: Mapping[str, Any]) -> None:
    """Copies `params.yaml` with its comments and with other values of some keys."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 120
    # As it is written in the file; by default it becomes nothing at all.
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    content = yaml.load(source.read_text(encoding="utf-8"))
    content.update(changes)
    with replace_on_success(target) as temporary, temporary.open("w", encoding="utf-8") as file:
        yaml.dump(content, file)


def end_orphans(folder: Path) -> None:
    """Ends stages that outlived a killed run in a workspace: nobody reads what they print, and they hold locks."""
    import psutil

    orphans = [process for process in psutil.process_iter() if _is_stage(process, folder)]
    for process in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(orphans, timeout=10)


def _is_stage(process: Any, folder: Path) -> bool:
    import psutil

    try:
        if Path(process.cwd()) != folder.resolve():
            return False
        words = process.cmdline()
    except (psutil.Error, OSError):  # Gone, or of another user.
        return False
    return "-m" in words and words[words.index("-m") + 1].partition(".")[0] in {"dvc", "tasks"}


def mend_locks(folder: Path) -> None:
    """DVC writes its files in place: what a kill cut short is dropped, and the cache has what the lock named."""
    from dvc.dvcfile import Lockfile
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    # Names processes that read and write; there are none, and their numbers may be those of others by now.
    (folder / ".dvc/tmp/rwlock").unlink(missing_ok=True)
    path = folder / LOCK_FILE
    if path.exists():
        try:
            with Repo(str(folder)) as repo:
                Lockfile(repo, str(path)).load()
        except DvcException:
            path.unlink()
