"""A GPU is not waited for inside of loops: what would wait is counted on a CPU, where the same operations run."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from numprune.capture import capture, enter
from numprune.choice import rank_model
from numprune.cutting import cut, twin
from numprune.obs import removal_order
from numprune.pruning import capture_to
from numprune.recipe import RECIPES
from numprune.samples import Samples
from numprune.statistics import Measured
from tests.numprune.test_obs import problem

# What brings a value, or a size that depends on values, to the program.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::unique_dim"}
# LAPACK's solver, and no GPU's, looks at the pivots before it uses them.
ON_A_CPU_ALONE = {"aten::linalg_lu_solve"}


def waits(run):
    """How often a GPU would be waited for."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    return sum(event.name in WAITING and not (ON_A_CPU_ALONE & set(callers(event))) for event in profiled.events())


def callers(event):
    while event := event.cpu_parent:
        yield event.name


def test_waiting_is_seen():
    """The three ways in which it comes about, and one that waits for nothing."""
    values = torch.arange(6.0)
    assert waits(lambda: values.sum().item()) == 1
    assert waits(lambda: bool((values > 2).any())) == 1
    assert waits(lambda: values[values > 2]) == 1
    assert waits(lambda: torch.linalg.solve(torch.eye(3), torch.ones(3, 1))) == 1
    assert waits(lambda: values[torch.tensor([0, 2])].square().cumsum(0)) == 0


@pytest.mark.parametrize(("units", "channels"), [(48, 1), (12, 4)])
def test_the_greedy_order_waits_as_often_for_one_round_as_for_many(units, channels):
    inputs, weight = problem(0, units * channels)
    gram = inputs.T @ inputs

    def order(at_once):
        return lambda: removal_order(gram, weight, channels=channels, damping=1e-6, at_once=at_once)

    assert waits(order(1)) == waits(order(units)) > 0


def phases(model, input_ids, folder, batch_size):
    measured = Measured(folder, input_ids, batch_size)
    kept = {f"{index}.{kind}": torch.arange(3) for index in range(3) for kind in ("attention", "mlp")}
    pruned = twin(model)
    return {
        "capture": lambda: list(capture(model, input_ids, batch_size=batch_size)),
        "rank": lambda: list(rank_model(model, RECIPES["best"], measured)),
        "refit": lambda: list(cut(pruned, kept, measured, recovery="refit")),
    }


@pytest.mark.parametrize("phase", ["capture", "rank", "refit"])
def test_a_phase_waits_as_often_for_one_batch_as_for_many(llama, input_ids, tmp_path, phase):
    list(capture_to(tmp_path, llama, input_ids, batch_size=12))
    found = {}
    for size in (12, 2):
        # Before the first block, the model's own forward pass looks at the positions of every batch.
        before = waits(lambda size=size: enter(llama, Samples(input_ids), size, llama.device))
        found[size] = waits(phases(llama, input_ids, tmp_path, size)[phase]) - before
    assert found[12] == found[2] > 0
