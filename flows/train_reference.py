"""Train the reference model again and write its card: `python -m flows.train_reference`."""

from pathlib import Path
from typing import Any

from flows.training import print_figures, step  # First: it prepares the environment for Prefect.

# isort: split
from prefect import flow

from tasks.corpus import write_corpus
from tasks.layout import CORPUS, model_folder
from tasks.parameters import ReferenceTraining, load_parameters
from tasks.reference import train_reference as train_model
from tasks.reference_card import measure, write_card

MODEL = "reference-llama"


def gather_text(training: ReferenceTraining) -> Path:
    """Writes the training text."""
    text = CORPUS / "training.jsonl"
    write_corpus(training.packages, text, seed=training.seed)
    return text


def gather_evaluation_text() -> None:
    """Writes the calibration and evaluation text, as the pipeline's first stage does."""
    corpus = load_parameters().corpus
    write_corpus(corpus.calibration, CORPUS / "calibration.jsonl", seed=corpus.seed)
    write_corpus(corpus.evaluation, CORPUS / "evaluation.jsonl", seed=corpus.seed)


# Tried again, a training goes on from its last checkpoint.
train = step(train_model, "train", retries=1)
evaluate = step(measure, "evaluate")
describe = step(write_card, "describe")
gather_training = step(gather_text, "training text")
gather_evaluation = step(gather_evaluation_text, "evaluation text")


@flow(name="train-reference", persist_result=False)
def train_reference() -> dict[str, Any]:
    """Text, training, held-out perplexity, card."""
    parameters = load_parameters()
    reference = parameters.reference
    folder = model_folder(MODEL)
    text = gather_training(reference.training)
    gather_evaluation()
    training = train(text, folder, reference.shape, reference.training)
    quality = evaluate(folder, parameters.evaluation)
    describe(folder, reference, training, quality)
    return {**training, **quality}


if __name__ == "__main__":
    print_figures(train_reference)
