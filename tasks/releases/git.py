"""git, as the release checkouts use it."""

import os
import subprocess
from pathlib import Path

from numprune.errors import NumpruneError

# Set by git for its hooks; they would point every command at the repository of the hook.
_OF_HOOKS = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX"}


def git(*arguments: str, folder: Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Runs git in a folder, without hooks and without maintenance in the background.

    Raises:
        NumpruneError: If it fails and `check` is set; it says what git said.
    """
    settings = ["-c", "core.hooksPath=/dev/null", "-c", "gc.auto=0", "-c", "maintenance.auto=false"]
    done = subprocess.run(
        ["git", *settings, *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in _OF_HOOKS},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode != 0:
        raise NumpruneError(f"git {' '.join(arguments)} in {folder} failed: {(done.stderr or done.stdout).strip()}")
    return done


def common_git_folder(folder: Path) -> Path:
    """The `.git` folder that all worktrees of a repository share.

    Raises:
        NumpruneError: If the folder is in no git repository.
    """
    return Path(git("rev-parse", "--path-format=absolute", "--git-common-dir", folder=folder).stdout.strip())


def main_checkout(folder: Path) -> Path:
    """The checkout that a repository began with, whichever of its worktrees `folder` is in.

    Raises:
        NumpruneError: If the folder is in no git repository.
    """
    return common_git_folder(folder).parent
