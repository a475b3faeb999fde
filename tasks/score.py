"""Step `score`: the Newton direction of every unit, from which scores at any ratio follow."""

from safetensors.torch import save_file

from numprune.architectures import prunable_groups
from numprune.checkpoint import load_model
from numprune.device import resolve_device, working_dtype
from numprune.files import replace_on_success
from numprune.progress import track
from numprune.pruning import Recipe, score_directions
from tasks.layout import model_folder, scores_file, statistics_folder
from tasks.parameters import load_parameters
from tasks.step import run_step


def score(model: str) -> None:
    """Scores the units of every block of a model."""
    parameters = load_parameters()
    device = resolve_device(parameters.compute.device)
    dense = load_model(model_folder(model), dtype=working_dtype(device))
    recipe = Recipe(**parameters.recipe.model_dump())
    groups = [group for block in prunable_groups(dense) for group in block]
    directions = score_directions(dense, statistics_folder(model), recipe, device)
    with replace_on_success(scores_file(model)) as temporary:
        save_file(dict(track(directions, len(groups), "score")), temporary)


if __name__ == "__main__":
    run_step(score)
