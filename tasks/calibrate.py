"""Step `calibrate`: the samples that everything else is measured on.

For a language model they are drawn from text. A model that writes images draws them itself, so many of each condition.
"""

import torch

from numprune.calibration import draw_samples
from numprune.checkpoint import load_config, load_model
from numprune.device import resolve_device, working_dtype
from numprune.images import batches, count_conditions, images_drawn, prompts_of_all, sample_images, writes_images
from numprune.progress import track
from numprune.samples import save_samples
from tasks.images.evaluation import sampling
from tasks.layout import calibration_file, model_folder
from tasks.parameters import Parameters, load_parameters
from tasks.step import run_step


def calibrate(model: str) -> None:
    """Draws and saves the calibration sequences of a model."""
    parameters = load_parameters()
    if writes_images(load_config(model_folder(model))):
        _from_the_model(model, parameters)
        return
    settings = parameters.calibration
    samples = draw_samples(
        settings.data, str(model_folder(model)), samples=settings.samples, length=settings.length, seed=settings.seed
    )
    save_samples(samples, calibration_file(model))


def _from_the_model(model: str, parameters: Parameters) -> None:
    folder, settings = model_folder(model), parameters.images
    device = resolve_device(parameters.compute.device)
    dense = load_model(folder, dtype=working_dtype(device), device=device)
    images = settings.calibration_per_condition * count_conditions(dense.config, folder)
    prompts = prompts_of_all(dense.config, folder, images)
    how = sampling(settings, seed=parameters.calibration.seed)
    drawn = track(sample_images(dense, prompts, how), batches(prompts, how), "calibrate")
    save_samples(images_drawn(torch.cat(list(drawn)), prompts), calibration_file(model))


if __name__ == "__main__":
    run_step(calibrate)
