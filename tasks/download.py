"""Fetch a model from the Hugging Face Hub at one exact commit; only weights in safetensors, never pickles."""

import os
import shutil

from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from tasks.layout import model_folder
from tasks.parameters import load_parameters
from tasks.step import run_step

# Python files are left out as well: nothing that is fetched is executed.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")

# Subfolders and `consolidated` files hold the same weights in other formats.
LEFT_OUT = ("*/*", "consolidated*")


def download(name: str) -> None:
    """Fetches the model `downloads.<name>` of params.yaml into `models/<name>`.

    Raises:
        NumpruneError: If params.yaml has no such download, the Hub refuses it, or it has no safetensors weights.
    """
    downloads = load_parameters().downloads
    if name not in downloads:
        raise NumpruneError(f"params.yaml has no downloads.{name}; it has: {', '.join(downloads) or 'none'}.")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    source = downloads[name]
    with replace_on_success(model_folder(name)) as temporary:
        try:
            snapshot_download(
                source.repository,
                revision=source.revision,
                local_dir=temporary,
                allow_patterns=list(FILES),
                ignore_patterns=list(LEFT_OUT),
            )
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise NumpruneError(
                f"downloads.{name}: cannot fetch {source.repository} at {source.revision}: {error}\nCheck the name and "
                "the commit; a gated model needs its licence accepted and a token from `hf auth login`."
            ) from None
        # The client's own notes hold times; with them the same model would be another one.
        shutil.rmtree(temporary / ".cache", ignore_errors=True)
        if not any(temporary.glob("*.safetensors")):
            raise NumpruneError(
                f"downloads.{name}: {source.repository} has no .safetensors weights at {source.revision}; pickled "
                "weights are refused because loading them can run any code. Choose a revision with safetensors."
            )


if __name__ == "__main__":
    run_step(download)
