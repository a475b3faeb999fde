"""Step `capture`: run the calibration sequences through the model, block by block, and keep second moments."""

from numprune.architectures import decoder_blocks
from numprune.checkpoint import load_model
from numprune.device import resolve_device, working_dtype
from numprune.files import replace_on_success
from numprune.progress import track
from numprune.pruning import capture_to
from numprune.samples import load_samples
from tasks.layout import calibration_file, model_folder, statistics_folder
from tasks.parameters import load_parameters
from tasks.step import run_step


def capture(model: str) -> None:
    """Writes the statistics of every block of a model."""
    compute = load_parameters().compute
    device = resolve_device(compute.device)
    dense = load_model(model_folder(model), dtype=working_dtype(device))
    input_ids = load_samples(calibration_file(model))
    with replace_on_success(statistics_folder(model)) as folder:
        blocks = capture_to(folder, dense, input_ids, batch_size=compute.batch_size, device=device)
        for _ in track(blocks, len(decoder_blocks(dense)), "capture"):
            pass


if __name__ == "__main__":
    run_step(capture)
