"""What the steps before have measured of a dense model, for those that rank and recover."""

from pathlib import Path

from numprune.device import resolve_device
from numprune.samples import load_samples
from numprune.statistics import Measured
from tasks.layout import calibration_file, statistics_folder
from tasks.parameters import Compute


def measured_dense(model: str, compute: Compute, work: Path | None = None) -> Measured:
    """Calibration samples and statistics of a dense model; and a folder for unfinished work on them."""
    return Measured(
        statistics=statistics_folder(model),
        samples=load_samples(calibration_file(model)),
        batch_size=compute.batch_size,
        device=resolve_device(compute.device),
        work=work,
    )
