"""Step `capture`: run the calibration sequences through the model, block by block, and keep second moments."""

from numprune.architectures import decoder_blocks
from numprune.checkpoint import open_model
from numprune.device import resolve_device, working_dtype
from numprune.progress import track
from numprune.pruning import capture_to
from numprune.resume import unfinished
from numprune.samples import load_samples
from tasks.layout import calibration_file, model_folder, statistics_folder
from tasks.parameters import load_parameters
from tasks.step import run_step


def capture(model: str) -> None:
    """Writes the statistics of every block of a model."""
    compute = load_parameters().compute
    device = resolve_device(compute.device)
    source, drawn = model_folder(model), calibration_file(model)
    dense = open_model(source, dtype=working_dtype(device))
    samples = load_samples(drawn)
    with unfinished(statistics_folder(model), source=source, samples=drawn, compute=compute) as work:
        blocks = capture_to(work / "result", dense, samples, batch_size=compute.batch_size, device=device, work=work)
        for _ in track(blocks, len(decoder_blocks(dense)), "capture"):
            pass


if __name__ == "__main__":
    run_step(capture, shared=True)
