import math

import pytest
import torch

from numprune.errors import NumpruneError
from numprune.perplexity import perplexity, window_losses


def test_equals_the_models_own_loss(model, input_ids):
    losses = torch.cat(list(window_losses(model, input_ids, batch_size=5)))
    measured = perplexity(losses, input_ids.shape[1])
    with torch.no_grad():
        expected = math.exp(model(input_ids, labels=input_ids).loss.item())
    assert measured.perplexity == pytest.approx(expected, rel=1e-5)
    assert (measured.windows, measured.length) == tuple(input_ids.shape)


def test_a_uniform_guess_costs_its_bits():
    """256 equally likely tokens of one byte each: 8 bits per byte."""
    result = perplexity(torch.full((5,), 9 * math.log(256)), length=10, text_bytes=50)
    assert result.perplexity == pytest.approx(256)
    assert result.bits_per_byte == pytest.approx(8)


def test_bytes_may_be_unknown():
    assert perplexity(torch.ones(2), length=4).bits_per_byte is None


def test_nan_is_an_error():
    with pytest.raises(NumpruneError, match="NaN or infinite"):
        perplexity(torch.tensor([1.0, math.nan]), length=4)
