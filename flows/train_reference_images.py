"""Train the reference image model again and write its card and its evaluation data.

python -m flows.train_reference_images
"""

from pathlib import Path
from typing import Any

from flows.training import print_figures, step  # First: it prepares the environment for Prefect.

# isort: split
from prefect import flow

from tasks.images.reference import measure_trained_on, train_digits_classifier, write_held_out
from tasks.layout import DIGITS, DIGITS_CLASSIFIER, model_folder
from tasks.parameters import load_parameters
from tasks.reference_images import measure, train_reference_images, write_card

MODEL = "reference-llamagen"

# Tried again, a training goes on from its last checkpoint.
train = step(train_reference_images, "train", retries=1)
classify = step(train_digits_classifier, "classifier")
hold_out = step(write_held_out, "held-out digits")
compare = step(measure_trained_on, "digits trained on")
evaluate = step(measure, "evaluate")
describe = step(write_card, "describe")


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


if __name__ == "__main__":
    print_figures(train_images)
