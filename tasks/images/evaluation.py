"""What is measured of the images that a model writes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.images import Sampling, batches, decode, prompts_of_all, sample_images
from numprune.progress import track
from numprune.samples import Samples
from tasks.images.drawing import encoded, grid
from tasks.images.features import extractor
from tasks.images.metrics import measure, read_reference
from tasks.parameters import Images

# Images of every model that the report shows.
_SHOWN = 40


def sampling(settings: Images, *, seed: int | None = None) -> Sampling:
    """How images are drawn; with another seed than that of the images that are compared if one is given."""
    return Sampling(
        guidance_scale=settings.guidance_scale,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed if seed is None else seed,
        batch_size=settings.batch_size,
    )


def measure_images(model: PreTrainedModel, dense: Path, settings: Images, title: str) -> dict[str, Any]:
    """Draws images and compares them with the reference.

    Args:
        model: That writes them.
        dense: Folder of the dense model.
        settings: How many, how, and compared with what.
        title: Of the progress.

    Returns:
        The metrics by name, and `protocol`.

    Raises:
        NumpruneError: If the reference or the features do not fit.
    """
    extract = extractor(settings.features.kind, Path(settings.features.weights))
    # Before anything is drawn: a file that does not fit is said at once.
    reference = read_reference(Path(settings.reference), extract)
    pixels = draw(model, dense, settings, settings.samples, title)
    protocol = settings.model_dump(mode="json", exclude={"calibration_per_condition", "data"})
    return {**measure(extract(pixels), reference).as_dict(), "protocol": protocol}


def draw(model: PreTrainedModel, dense: Path, settings: Images, images: int, title: str) -> Tensor:
    """Pixels of so many images of all conditions in turn, (images, height, width, channels) uint8."""
    prompts = prompts_of_all(model.config, dense, images)
    drawn = sample_images(model, prompts, sampling(settings))
    sequences = torch.cat(list(_tracked(drawn, prompts, settings, title)))
    return decode(sequences, model.config, dense)


def side_by_side(dense: PreTrainedModel, pruned: PreTrainedModel, folder: Path, settings: Images) -> dict[str, Any]:
    """Grids of images of both models, drawn with the same random numbers, as base64 of PNG files."""
    # A whole batch, because the random numbers of an image depend on its place in it.
    count = min(settings.samples, settings.batch_size)
    shown = {
        name: draw(model, folder, settings, count, f"images of {name}")[:_SHOWN]
        for name, model in (("dense", dense), ("pruned", pruned))
    }
    return {name: encoded(grid(images, columns=10)) for name, images in shown.items()} | {
        "shown": len(shown["dense"]),
        "seed": settings.seed,
    }


def _tracked(drawn: Iterator[Tensor], prompts: Samples, settings: Images, title: str) -> Iterator[Tensor]:
    return track(drawn, batches(prompts, sampling(settings)), title)
