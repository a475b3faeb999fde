"""Step `digits`: the handwritten digits that reference-llamagen was not trained on, as scikit-learn has them."""

from tasks.images.reference import write_held_out
from tasks.layout import DIGITS, DIGITS_CLASSIFIER
from tasks.parameters import load_parameters
from tasks.step import run_step


def digits() -> None:
    """Writes held-out digits as tokens, and the statistics that images are compared with."""
    write_held_out(DIGITS, DIGITS_CLASSIFIER, load_parameters().reference_images.training)


if __name__ == "__main__":
    run_step(digits)
