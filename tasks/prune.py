"""Step `prune`: the global threshold decides which units go; the outcome is the pruning plan."""

from safetensors.torch import load_file

from numprune.architectures import prunable_groups
from numprune.checkpoint import fingerprint as model_fingerprint
from numprune.checkpoint import load_shapes
from numprune.plan import Source, make_plan
from numprune.pruning import scores_at
from numprune.samples import fingerprint, load_samples
from tasks.layout import calibration_file, model_folder, plan_file, scores_file
from tasks.parameters import load_parameters
from tasks.step import run_step


def prune(model: str, ratio: float) -> None:
    """Writes the plan of a model at a ratio."""
    parameters = load_parameters()
    recipe = parameters.recipe
    folder = model_folder(model)
    download = parameters.downloads.get(model)
    source = Source(
        model=download.repository if download else model,
        revision=download.revision if download else None,
        fingerprint=model_fingerprint(folder),
        calibration=fingerprint(load_samples(calibration_file(model))),
    )
    groups = [group for block in prunable_groups(load_shapes(folder)) for group in block]
    scores = scores_at(load_file(scores_file(model)), ratio)
    plan = make_plan(groups, scores, ratio, source=source, recipe=recipe.model_dump(), threshold=recipe.threshold)
    plan.save(plan_file(model, ratio))


if __name__ == "__main__":
    run_step(prune)
