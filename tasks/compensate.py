"""Step `compensate`: cut the model by its plan, let the kept weights take over, write the pruned checkpoint."""

from numprune.architectures import decoder_blocks
from numprune.checkpoint import check_output, load_model, save_pruned, weight_bytes
from numprune.device import resolve_device, working_dtype
from numprune.plan import PruningPlan
from numprune.progress import track
from numprune.pruning import Measured, apply_plan
from numprune.samples import load_samples
from tasks.layout import calibration_file, checkpoint_folder, model_folder, plan_file, statistics_folder
from tasks.parameters import load_parameters
from tasks.step import run_step


def compensate(model: str, ratio: float) -> None:
    """Writes the pruned and compensated checkpoint of a model at a ratio."""
    parameters = load_parameters()
    source, output = model_folder(model), checkpoint_folder(model, ratio)
    check_output(output, weight_bytes(source))
    plan = PruningPlan.load(plan_file(model, ratio))
    device = resolve_device(parameters.compute.device)
    pruned = load_model(source, dtype=working_dtype(device))
    recipe = parameters.recipe
    input_ids = load_samples(calibration_file(model))
    measured = Measured(statistics_folder(model), input_ids, parameters.compute.batch_size)
    blocks = apply_plan(
        pruned, plan, measured, recovery=recipe.recovery, damping=recipe.compensation_damping, device=device
    )
    for _ in track(blocks, len(decoder_blocks(pruned)), "compensate"):
        pass
    save_pruned(pruned, source, output, plan, input_ids)


if __name__ == "__main__":
    run_step(compensate)
