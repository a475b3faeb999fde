"""Pruned checkpoints to the Hugging Face Hub, or to what HF_ENDPOINT names.

The token is the one of `hf auth login` or of the variable HF_TOKEN; it is never an argument.
"""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from numprune import pickled
from numprune.card import CARD
from numprune.checkpoint import PLAN_FILE, load_config, weight_files
from numprune.errors import NumpruneError
from numprune.plan import PruningPlan


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Uploads a pruned folder as it is.

    Args:
        folder: Written by `numprune prune`, or a version of the pipeline.
        repository: `OWNER/NAME`; it is made if it is not there.
        public: Whether everybody may read it.

    Returns:
        The address of the commit.

    Raises:
        NumpruneError: If the folder is no pruned checkpoint, holds a pickle or a link, the repository is public and
            `public` is not set, or the Hub refuses.
    """
    _check(folder, repository)
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(repository).private:
            raise NumpruneError(f"{repository} is public already: use --public, or choose another repository.")
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Pruned with numprune")
    except LocalTokenNotFoundError:
        raise NumpruneError("No token for the Hub: run `hf auth login` or set HF_TOKEN.") from None
    except (HfHubHTTPError, OSError) as error:
        raise NumpruneError(f"The Hub did not take {repository}: {str(error).splitlines()[0]}") from None
    return str(commit.commit_url)


def _check(folder: Path, repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise NumpruneError(f"{repository!r} is no repository: {str(error).splitlines()[0]}") from None
    if "/" not in repository:
        raise NumpruneError(f"{repository!r} has no owner: OWNER/NAME is needed.")
    if not (folder / PLAN_FILE).is_file() or not (folder / CARD).is_file():
        raise NumpruneError(
            f"{folder} is no pruned checkpoint: {PLAN_FILE} and {CARD} must be there. `numprune prune` writes both."
        )
    PruningPlan.load(folder / PLAN_FILE)
    load_config(folder)
    weight_files(folder)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in pickled.SUFFIXES:
            raise NumpruneError(f"{path} may hold a pickle, which can run code when opened: remove it.")
        if path.is_symlink():
            raise NumpruneError(f"{path} is a link: what it points to would be uploaded. Remove it.")
