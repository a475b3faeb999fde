"""Step `compensate`: cut the model by its plan, let the kept weights take over, write the pruned checkpoint."""

from numprune.architectures import decoder_blocks
from numprune.checkpoint import block_bytes, check_output, check_space, open_model, weight_bytes
from numprune.device import resolve_device, working_dtype
from numprune.files import held_bytes
from numprune.plan import PruningPlan
from numprune.progress import track
from numprune.pruning import apply_plan
from numprune.resume import unfinished
from numprune.saving import save_pruned
from tasks.layout import checkpoint_folder, model_folder, plan_file
from tasks.parameters import load_parameters
from tasks.statistics import measured_dense
from tasks.step import run_step


def compensate(model: str, budget: str) -> None:
    """Writes the pruned and compensated checkpoint of a model for a budget."""
    parameters = load_parameters()
    source, output = model_folder(model), checkpoint_folder(model, budget)
    check_output(output)
    planned = plan_file(model, budget)
    plan = PruningPlan.load(planned)
    dtype = working_dtype(resolve_device(parameters.compute.device))
    pruned = open_model(source, dtype=dtype)
    recipe = parameters.recipe.resolve()
    measured = measured_dense(model, parameters.compute)
    depends_on = {"source": source, "plan": planned, "statistics": measured.statistics, "recipe": recipe}
    with unfinished(output, compute=parameters.compute, **depends_on) as work:
        # The work folder has the blocks in the precision that is computed in.
        check_space(output, weight_bytes(source) + block_bytes(source, dtype) - held_bytes(work))
        blocks = apply_plan(pruned, plan, measured, recovery=recipe.recovery, damping=recipe.damping, work=work)
        for _ in track(blocks, len(decoder_blocks(pruned)), "compensate"):
            pass
        save_pruned(pruned, source, output, plan, measured.samples)


if __name__ == "__main__":
    run_step(compensate, shared=True, beside_others=True)
