"""Train the reference model again and write its card: `python -m flows.train_reference`."""

from pathlib import Path
from typing import Any

from flows.environment import prepare_environment

prepare_environment()

from prefect import Task, flow, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402

from numprune.errors import reported  # noqa: E402
from tasks.corpus import write_corpus  # noqa: E402
from tasks.layout import CORPUS, model_folder  # noqa: E402
from tasks.parameters import ReferenceTraining, load_parameters  # noqa: E402
from tasks.reference import train_reference as train_model  # noqa: E402
from tasks.reference_card import measure, write_card  # noqa: E402

MODEL = "reference-llama"


@task(cache_policy=NO_CACHE, persist_result=False)
def gather_text(training: ReferenceTraining) -> Path:
    """Writes the training text."""
    text = CORPUS / "training.jsonl"
    write_corpus(training.packages, text, seed=training.seed)
    return text


@task(cache_policy=NO_CACHE, persist_result=False)
def gather_evaluation_text() -> None:
    """Writes the calibration and evaluation text, as the pipeline's first stage does."""
    corpus = load_parameters().corpus
    write_corpus(corpus.calibration, CORPUS / "calibration.jsonl", seed=corpus.seed)
    write_corpus(corpus.evaluation, CORPUS / "evaluation.jsonl", seed=corpus.seed)


# Tried again, a training goes on from its last checkpoint.
train = Task(train_model, name="train", cache_policy=NO_CACHE, persist_result=False, retries=1)
evaluate = Task(measure, name="evaluate", cache_policy=NO_CACHE, persist_result=False)
describe = Task(write_card, name="describe", cache_policy=NO_CACHE, persist_result=False)


@flow(name="train-reference", persist_result=False)
def train_reference() -> dict[str, Any]:
    """Text, training, held-out perplexity, card."""
    parameters = load_parameters()
    reference = parameters.reference
    folder = model_folder(MODEL)
    text = gather_text(reference.training)
    gather_evaluation_text()
    training = train(text, folder, reference.shape, reference.training)
    quality = evaluate(folder, parameters.evaluation)
    describe(folder, reference, training, quality)
    return {**training, **quality}


def main() -> None:
    """Runs the flow and prints the figures of the card."""
    with reported():
        load_parameters()
        for name, value in train_reference().items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
