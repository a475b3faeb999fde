import pytest
import torch

from numprune import batches
from numprune.batches import activation_bytes, fitting_batch
from numprune.capture import capture
from numprune.checkpoint import load_model, open_model
from tests.numprune.conftest import CONFIGS, random_model

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return random_model(CONFIGS["llama"])


@pytest.mark.parametrize(("length", "expected"), [(1, 8192), (100, 81), (512, 16), (2048, 4), (8192, 1), (9000, 1)])
def test_a_batch_has_as_many_tokens_whatever_the_length(model, length, expected):
    assert fitting_batch(model, length, CPU) == expected


@pytest.mark.parametrize("tokens", [1, 50, 1000])
def test_activations_of_a_batch_take_an_eighth_of_the_memory(model, monkeypatch, tokens):
    monkeypatch.setattr(batches, "total_memory", lambda _device: 8 * tokens * activation_bytes(model))
    assert fitting_batch(model, 10, CPU) == max(1, tokens // 10)


def test_it_is_the_same_for_a_model_that_is_read_block_by_block(make_checkpoint):
    folder = make_checkpoint()
    assert activation_bytes(open_model(folder)) == activation_bytes(load_model(folder)) > 0


def test_calibration_goes_through_in_such_batches(model, monkeypatch):
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(batches, "_TOKENS", 50)
    list(capture(model, torch.randint(100, (11, 12))))
    assert seen == [4, 4, 3]
