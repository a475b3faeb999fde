"""Step `score`: in which order the units of every layer go, and what that costs the model, for every budget alike."""

from numprune.architectures import decoder_blocks, prunable_groups
from numprune.checkpoint import load_model
from numprune.choice import rank_model
from numprune.device import resolve_device, working_dtype
from numprune.progress import track
from numprune.ranking import Ranking, save_rankings
from tasks.layout import model_folder, scores_file
from tasks.parameters import load_parameters
from tasks.statistics import measured_dense
from tasks.step import run_step


def score(model: str) -> None:
    """Ranks the units of every block of a model."""
    parameters = load_parameters()
    recipe = parameters.recipe.resolve()
    rankings: dict[str, Ranking] = {}
    # The scores of `box` depend on the budget: they are computed where that is known.
    if recipe.selection != "box":
        device = resolve_device(parameters.compute.device)
        dense = load_model(model_folder(model), dtype=working_dtype(device))
        measured = measured_dense(model, parameters.compute)
        blocks = map(measured.block, range(len(decoder_blocks(dense))))
        groups = sum(len(groups) for groups in prunable_groups(dense))
        rankings = dict(track(rank_model(dense, blocks, recipe, measured), groups, "score"))
    save_rankings(rankings, scores_file(model))


if __name__ == "__main__":
    run_step(score)
