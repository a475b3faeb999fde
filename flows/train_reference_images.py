"""Train the reference image model again and write its card and its evaluation data.

python -m flows.train_reference_images
"""

from pathlib import Path
from typing import Any

from flows.environment import prepare_environment

prepare_environment()

from prefect import Task, flow  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402

from numprune.errors import reported  # noqa: E402
from tasks.images.reference import measure_trained_on, train_digits_classifier, write_held_out  # noqa: E402
from tasks.layout import DIGITS, DIGITS_CLASSIFIER, model_folder  # noqa: E402
from tasks.parameters import load_parameters  # noqa: E402
from tasks.reference_images import measure, train_reference_images, write_card  # noqa: E402

MODEL = "reference-llamagen"

# Tried again, a training goes on from its last checkpoint.
train = Task(train_reference_images, name="train", cache_policy=NO_CACHE, persist_result=False, retries=1)
classify = Task(train_digits_classifier, name="classifier", cache_policy=NO_CACHE, persist_result=False)
hold_out = Task(write_held_out, name="held-out digits", cache_policy=NO_CACHE, persist_result=False)
compare = Task(measure_trained_on, name="digits trained on", cache_policy=NO_CACHE, persist_result=False)
evaluate = Task(measure, name="evaluate", cache_policy=NO_CACHE, persist_result=False)
describe = Task(write_card, name="describe", cache_policy=NO_CACHE, persist_result=False)


@flow(name="train-reference-images", persist_result=False)
def train_images() -> dict[str, Any]:
    """Classifier, held-out digits, training, metrics, card."""
    parameters = load_parameters()
    folder, settings = model_folder(MODEL), parameters.reference_images.training
    data: dict[str, Any] = {"classifier_accuracy": classify(DIGITS_CLASSIFIER, settings)}
    hold_out(DIGITS, DIGITS_CLASSIFIER, settings)
    data["digits_trained_on"] = compare(Path(parameters.images.reference), DIGITS_CLASSIFIER, settings)
    training = train(folder, parameters.reference_images)
    metrics = evaluate(folder, parameters.images)
    describe(folder, parameters, training, metrics, data)
    return {**training, **data, **metrics}


def main() -> None:
    """Runs the flow and prints the figures of the card."""
    with reported():
        load_parameters()
        for name, value in train_images().items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
