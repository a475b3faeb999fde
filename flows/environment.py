"""Settings of Prefect and MLflow that must stand in the environment before either is imported."""

import atexit
import gc
import os
import sys
from pathlib import Path


def prepare_environment() -> None:
    """Sets what is not set yet: no telemetry, history in this checkout, this interpreter for every stage."""
    defaults = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "60",
        # Bars are for terminals; the stages print lines of their own.
        "TQDM_DISABLE": "1",
        # One cache: DVC's.
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    }
    if not {"PREFECT_API_URL", "PREFECT_PROFILE"} & os.environ.keys():
        # A database of its own: one in the home folder may have been upgraded by another version of Prefect.
        defaults["PREFECT_HOME"] = str(Path(".prefect").resolve())
        defaults["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "true"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # What is imported stays: looking for garbage in it delays every import, and the end of the process most of all.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    # dvc.yaml says `python`; it means the one that runs this.
    folders = os.environ.get("PATH", "").split(os.pathsep)
    own = str(Path(sys.executable).parent)
    if folders[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, *folders])
