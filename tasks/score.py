"""Step `score`: in which order the units of every layer go, and what that costs the model, for every budget alike."""

from numprune.checkpoint import open_model
from numprune.choice import rank_model
from numprune.device import resolve_device, working_dtype
from numprune.progress import track
from numprune.ranking import Ranking, save_rankings
from numprune.ranks import is_first
from numprune.resume import unfinished
from tasks.layout import calibration_file, model_folder, scores_file, statistics_folder
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
        source, statistics = model_folder(model), statistics_folder(model)
        dense = open_model(source, dtype=working_dtype(device))
        measured = measured_dense(model, parameters.compute)
        depends_on = {"source": source, "statistics": statistics, "samples": calibration_file(model)}
        with unfinished(scores_file(model), recipe=recipe, compute=parameters.compute, **depends_on) as work:
            rankings = dict(rank_model(dense, recipe, measured, work=work, watch=track, title="score"))
    if is_first():
        save_rankings(rankings, scores_file(model))


if __name__ == "__main__":
    run_step(score, shared=True)
