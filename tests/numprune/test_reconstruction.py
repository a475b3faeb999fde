import copy

import pytest
import torch

from numprune.architectures import all_groups
from numprune.plan import Source, make_plan
from numprune.pruning import apply_plan, capture_to
from numprune.recipe import Recipe
from numprune.reconstruction import hidden_state_errors
from numprune.statistics import Measured
from tests.numprune.conftest import choose


def test_errors_are_those_of_the_hidden_states_in_float64(llama, input_ids):
    """Against transformers' own list of hidden states, and the input of the last norm for the last block."""
    dense = llama.double()
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(0.9)
    errors = hidden_state_errors(dense, {"same": copy.deepcopy(dense), "other": other}, input_ids, batch_size=5)

    def states(model):
        last = []
        hook = model.model.norm.register_forward_pre_hook(lambda _module, inputs: last.append(inputs[0]))
        with torch.no_grad():
            given = model.model(input_ids, output_hidden_states=True).hidden_states
        hook.remove()
        # The embeddings come first; in place of the last block's output stands that of the norm.
        return [*given[1:-1], *last, given[-1]]

    wanted = [
        ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).square().mean()
        for found, exact in zip(states(other), states(dense), strict=True)
    ]
    torch.testing.assert_close(errors["other"], torch.stack(wanted), rtol=1e-12, atol=1e-15)
    assert errors["same"].tolist() == [0.0] * 4
    assert errors["other"][0] == 0
    assert errors["other"][1:].min() > 0


@pytest.mark.parametrize("recovery", ["least_squares", "refit"])
def test_recovery_lowers_the_error_after_the_last_block(llama, input_ids, tmp_path, recovery):
    list(capture_to(tmp_path, llama, input_ids, batch_size=5))
    measured = Measured(tmp_path, input_ids, batch_size=5)
    plan = make_plan(
        all_groups(llama), choose(llama, measured, 0.4), "0.4", source=Source("", None, "", ""), recipe=Recipe()
    )
    models = {}
    for name in ("none", recovery):
        models[name] = copy.deepcopy(llama)
        list(apply_plan(models[name], plan, measured, recovery=name))
    errors = hidden_state_errors(llama, models, input_ids)
    assert errors[recovery][-2] < errors["none"][-2]
