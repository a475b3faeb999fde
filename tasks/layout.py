"""Where the pipeline's files lie, below the folder it runs in; `dvc.yaml` names the same places."""

from pathlib import Path

CORPUS = Path("data/corpus")
DIGITS = Path("data/digits")
DIGITS_CLASSIFIER = Path("evaluation/digits/classifier.safetensors")
TEXTS_FOLDER = Path("data/texts")
REPORT = Path("report")
PLOTS = REPORT / "plots"
SWEEP_REPORT = REPORT / "sweep"


def model_folder(model: str) -> Path:
    """The dense checkpoint."""
    return Path("models") / model


def calibration_file(model: str) -> Path:
    """The drawn token sequences."""
    return _model_artifacts(model) / "calibration.safetensors"


def statistics_folder(model: str) -> Path:
    """Second moments, one file a block."""
    return _model_artifacts(model) / "statistics"


def scores_file(model: str) -> Path:
    """Newton directions of all units."""
    return _model_artifacts(model) / "scores.safetensors"


def plan_file(model: str, budget: str) -> Path:
    """The pruning plan."""
    return run_folder(model, budget) / "plan.json"


def checkpoint_folder(model: str, budget: str) -> Path:
    """The pruned checkpoint."""
    return run_folder(model, budget) / "checkpoint"


def evaluation_file(model: str, budget: str | None) -> Path:
    """Quality of a pruned model, or of the dense one if there is no budget."""
    return run_folder(model, budget) / "evaluation.json"


def timing_file(model: str, budget: str | None) -> Path:
    """How long an evaluation took, and when."""
    return run_folder(model, budget) / "timing.json"


def answers_file(model: str, budget: str | None) -> Path:
    """Which questions a pruned model answers right, or the dense one if there is no budget."""
    return run_folder(model, budget) / "answers.json"


def comparison_file(model: str, budget: str) -> Path:
    """Hidden states and generated text of a pruned model beside the dense one's."""
    return run_folder(model, budget) / "comparison.json"


def benchmark_file(model: str, budget: str) -> Path:
    """Cost of the dense and a pruned model."""
    return run_folder(model, budget) / "benchmark.json"


def run_folder(model: str, budget: str | None) -> Path:
    """All files of one budget, or of the dense model if there is none."""
    return _model_artifacts(model) / ("dense" if budget is None else budget)


def report_page(model: str | None = None, budget: str | None = None) -> Path:
    """The page of a run, or of all of them if no model is given."""
    return REPORT / "index.html" if model is None else REPORT / "runs" / f"{model}-{budget}.html"


def plots_folder(model: str, budget: str) -> Path:
    """The plots of a run, and their data."""
    return PLOTS / f"{model}-{budget}"


def _model_artifacts(model: str) -> Path:
    return Path("artifacts") / model
