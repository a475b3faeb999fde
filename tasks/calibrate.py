"""Step `calibrate`: draw the token sequences that everything else is measured on."""

from numprune.calibration import draw_samples
from numprune.samples import save_samples
from tasks.layout import calibration_file, model_folder
from tasks.parameters import load_parameters
from tasks.step import run_step


def calibrate(model: str) -> None:
    """Draws and saves the calibration sequences of a model."""
    settings = load_parameters().calibration
    input_ids = draw_samples(
        settings.data, str(model_folder(model)), samples=settings.samples, length=settings.length, seed=settings.seed
    )
    save_samples(input_ids, calibration_file(model))


if __name__ == "__main__":
    run_step(calibrate)
