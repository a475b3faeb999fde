"""Step `prune`: the budget decides which units go; the outcome is the pruning plan."""

from numprune.architectures import all_groups
from numprune.budget import parse_budget
from numprune.checkpoint import fingerprint as model_fingerprint
from numprune.checkpoint import load_model, load_shapes, open_model
from numprune.device import resolve_device, working_dtype
from numprune.plan import Source, make_plan
from numprune.planning import choose_within
from numprune.progress import track
from numprune.ranking import load_rankings
from numprune.resume import unfinished
from numprune.samples import fingerprint
from tasks.layout import model_folder, plan_file, scores_file
from tasks.parameters import load_parameters
from tasks.statistics import measured_dense
from tasks.step import run_step


def prune(model: str, budget: str) -> None:
    """Writes the plan of a model for a budget."""
    parameters = load_parameters()
    recipe, workload = parameters.recipe.resolve(), parameters.workload
    device = resolve_device(parameters.compute.device)
    folder, scores = model_folder(model), scores_file(model)
    wanted = parse_budget(budget, batch=workload.batch, length=workload.length)
    rankings = load_rankings(scores)
    stored = load_model(folder, device=device) if wanted.kind == "latency" else load_shapes(folder)
    # With the rankings at hand, one step needs nothing but shapes.
    shapes_suffice = rankings and recipe.steps == 1
    dense = load_shapes(folder) if shapes_suffice else open_model(folder, dtype=working_dtype(device))
    depends_on = {"source": folder, "scores": scores, "recipe": recipe, "budget": wanted, "compute": parameters.compute}
    with unfinished(plan_file(model, budget), **depends_on) as work:
        measured = measured_dense(model, parameters.compute, work)
        choice = choose_within(wanted, dense, stored, recipe, measured, rankings=rankings or None, watch=track)
    download = parameters.downloads.get(model)
    source = Source(
        model=download.origin if download else model,
        revision=download.revision if download else None,
        fingerprint=model_fingerprint(folder),
        calibration=fingerprint(measured.samples),
    )
    groups = all_groups(dense)
    make_plan(groups, choice, budget, source=source, recipe=recipe).save(plan_file(model, budget))


if __name__ == "__main__":
    run_step(prune, beside_others=True)
