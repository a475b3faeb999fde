"""Where the pipeline's files lie; `dvc.yaml` names the same places."""

from pathlib import Path

REPORT = Path("report")


def model_folder(model: str) -> Path:
    """The folder of a source model."""
    return Path("models") / model


def model_artifacts(model: str) -> Path:
    """What is made once for a model: calibration, statistics, scores."""
    return Path("artifacts") / model


def dense_artifacts(model: str) -> Path:
    """What is measured on the model before pruning."""
    return model_artifacts(model) / "dense"


def ratio_artifacts(model: str, ratio: float) -> Path:
    """What is made for a model at one ratio: plan, checkpoint, evaluation, benchmark."""
    return model_artifacts(model) / str(ratio)
