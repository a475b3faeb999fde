"""The checkout of a release: a git worktree on a branch of its own, with the DVC cache of the repository.

Results of other releases, uncommitted work and a second run beside it do not touch it. A run that was killed left it in
any state; `prepare` mends that, and what was finished is not done again.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from numprune.errors import NumpruneError
from tasks.parameters import PARAMETERS_FILE, Parameters, load_parameters
from tasks.releases.git import common_git_folder, git, main_checkout
from tasks.releases.ledger import Entry, shaping_hash
from tasks.workspace import (
    LOCK_FILE,
    end_orphans,
    link_inputs,
    link_registry,
    mend_locks,
    share_cache,
    write_parameters,
)

# In git's own folder of the worktree: written when everything else is there.
_READY = "numprune-ready"


def prepare(entry: Entry, parameters: Parameters, root: Path) -> Path:
    """Makes the worktree of a release, or mends and reuses the one that an earlier run left.

    Args:
        entry: The release, its branch and the hash of the parameters it was announced with.
        parameters: Of the checkout at `root`.
        root: The checkout whose commit, `params.yaml`, DVC settings and registry the release takes.

    Returns:
        The folder of the worktree.

    Raises:
        NumpruneError: If `params.yaml` changed since the release was announced, or git fails.
    """
    folder = worktree_folder(entry, parameters, root)
    # Where git keeps what belongs to this worktree. It is named after the last part of the path.
    private = common_git_folder(root) / "worktrees" / folder.name
    end_orphans(folder)
    if not (private / _READY).exists() or not folder.is_dir():
        _add_worktree(entry, folder, private, root)
    for lock in (*private.glob("*.lock"), common_git_folder(root) / "refs/heads" / f"{entry.branch}.lock"):
        lock.unlink(missing_ok=True)  # Of a git that was killed: nobody else works in this worktree or on its branch.
    share_cache(folder, root)
    link_registry(parameters.registry, folder, root)
    link_inputs(parameters, folder, root)
    if not _is_prepared(entry, folder):
        if shaping_hash(parameters) != entry.key.parameters:
            raise NumpruneError(
                f"{entry.key.name}: {PARAMETERS_FILE} changed since this release was announced; the next poll "
                "announces it again with the present parameters."
            )
        # The lock of the base names the results of other models; the record of this release names its own.
        (folder / LOCK_FILE).unlink(missing_ok=True)
        only = {
            "models": [entry.key.name],
            "downloads": {entry.key.name: entry.release.download.model_dump(exclude_none=True)},
        }
        write_parameters(root / PARAMETERS_FILE, folder / PARAMETERS_FILE, only)
    mend_locks(folder)
    (private / _READY).touch()
    return folder


def worktree_folder(entry: Entry, parameters: Parameters, root: Path) -> Path:
    """Where the worktree of a release lies, whether it is there or not."""
    worktrees = main_checkout(root) / Path(parameters.watch.worktrees).expanduser()
    return worktrees / entry.branch.removeprefix("release/").replace("/", "-")


def commit(entry: Entry, folder: Path) -> str:
    """Commits `params.yaml` and `dvc.lock`, the record of the release, unless they are committed.

    Returns:
        The hash of the branch's last commit.

    Raises:
        NumpruneError: If git refuses.
    """
    git("add", "--", str(PARAMETERS_FILE), LOCK_FILE, folder=folder)
    if git("diff", "--cached", "--quiet", folder=folder, check=False).returncode != 0:
        budgets = ", ".join(load_parameters(folder / PARAMETERS_FILE).budgets)
        message = (
            f"Compress {entry.key.name} {entry.key.revision[:12]} at {budgets}\n\n"
            f"Source: {entry.release.download.origin}\nRevision: {entry.key.revision}\nBudgets: {budgets}\n"
        )
        git(*_identity(folder), "commit", "--quiet", "--message", message, folder=folder)
    return git("rev-parse", "HEAD", folder=folder).stdout.strip()


def push(folder: Path) -> str | None:
    """Sends the results that `dvc.lock` names to DVC's default remote.

    Returns:
        The name of the remote; None if none is configured.

    Raises:
        ConnectionError: If DVC fails; it says what DVC said.
    """
    from dvc.config import Config

    remote = Config(str(folder / ".dvc")).get("core", {}).get("remote")
    if remote is None:
        return None
    command = [sys.executable, "-m", "dvc", "push", "dvc.yaml"]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConnectionError(f"dvc push to {remote} failed: {done.stderr.strip()}")
    return str(remote)


def push_branch(entry: Entry, folder: Path, remote: str) -> None:
    """Sends the branch of a release to a git remote.

    Raises:
        ConnectionError: If git fails; it says what git said.
    """
    try:
        git("push", "--quiet", remote, entry.branch, folder=folder)
    except NumpruneError as error:
        raise ConnectionError(str(error)) from error


def remove(entry: Entry, parameters: Parameters, root: Path) -> None:
    """Removes the worktree of a release; its branch stays, and its results are in DVC's cache.

    Raises:
        NumpruneError: If git refuses.
    """
    folder = worktree_folder(entry, parameters, root)
    if folder.exists():
        # Models and results in it are ignored by git; hence the force.
        git("worktree", "remove", "--force", str(folder), folder=root)


def _add_worktree(entry: Entry, folder: Path, private: Path, root: Path) -> None:
    # What a killed run left of it is in an unknown state, and may be locked. The branch keeps what was committed.
    for leftover in (folder, private):
        if leftover.exists():
            shutil.rmtree(leftover)
    folder.parent.mkdir(parents=True, exist_ok=True)
    exists = git("show-ref", "--quiet", "--verify", f"refs/heads/{entry.branch}", folder=root, check=False)
    new = [] if exists.returncode == 0 else ["-b", entry.branch]
    git("worktree", "add", "--quiet", *new, str(folder), *([] if new else [entry.branch]), folder=root)


def _is_prepared(entry: Entry, folder: Path) -> bool:
    try:
        parameters = load_parameters(folder / PARAMETERS_FILE)
    except NumpruneError:
        return False
    name = entry.key.name
    return (
        shaping_hash(parameters) == entry.key.parameters
        and parameters.models == [name]
        and parameters.downloads == {name: entry.release.download}
    )


def _identity(folder: Path) -> list[str]:
    """Settings for a committer where git has none, as on a server."""
    if "GIT_COMMITTER_EMAIL" in os.environ or git("config", "user.email", folder=folder, check=False).stdout.strip():
        return []
    return ["-c", "user.name=numprune", "-c", "user.email=numprune@localhost"]
