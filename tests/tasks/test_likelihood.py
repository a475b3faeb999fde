import math
import random
import statistics

import pytest

from tasks.likelihood import Likelihood, likelihood

BITS = math.log(2)


def test_from_the_pairs_of_lm_eval() -> None:
    samples = [
        {"bits_per_byte": (-8 * BITS, 4), "word_perplexity": (-8 * BITS, 2)},
        {"bits_per_byte": (-4 * BITS, 8), "word_perplexity": (-4 * BITS, 4)},
    ]
    read = likelihood(samples, "t")
    assert read.bits_per_byte == pytest.approx(1.0)
    assert read.word_perplexity == pytest.approx(2**2)


def test_difference_is_that_of_both_figures() -> None:
    dense = Likelihood((5.0, 1.0), (10, 2), (3, 1), "t")
    pruned = Likelihood((6.0, 1.5), (10, 2), (3, 1), "t")
    difference = pruned.difference(dense)
    assert difference["difference"] == pytest.approx(pruned.bits_per_byte - dense.bits_per_byte)
    assert difference["low"] < difference["difference"] < difference["high"]
    assert dense.difference(dense) == {"difference": 0.0, "stderr": 0.0, "low": 0.0, "high": 0.0}


def test_standard_error_is_that_of_repeated_draws() -> None:
    draw = random.Random(0)

    def drawn() -> dict[str, float]:
        sizes = [draw.randint(50, 400) for _ in range(100)]
        added = [size * draw.gauss(0.1, 0.05) for size in sizes]
        words = (1,) * len(sizes)
        dense = Likelihood(tuple(float(size) for size in sizes), tuple(sizes), words, "t")
        losses = tuple(loss + more for loss, more in zip(dense.losses, added, strict=True))
        return Likelihood(losses, dense.sizes, words, "t").difference(dense)

    draws = [drawn() for _ in range(400)]
    spread = statistics.stdev(found["difference"] for found in draws)
    assert statistics.fmean(found["stderr"] for found in draws) == pytest.approx(spread, rel=0.1)


def test_other_documents_are_not_compared() -> None:
    with pytest.raises(ValueError, match="read other documents"):
        Likelihood((1.0,), (1,), (1,), "a").difference(Likelihood((1.0,), (1,), (1,), "b"))
