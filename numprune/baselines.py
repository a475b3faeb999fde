"""Scores of other methods to compare the numerical score with, one per input channel of an output projection."""

from typing import Literal

import torch
from torch import Tensor

from numprune.statistics import Moments

Baseline = Literal["random", "magnitude", "wanda_sp", "flap"]


def baseline_score(
    baseline: Baseline, moments: Moments, weight: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """A baseline's score of one projection's input channels: high is kept, low is pruned.

    With X_i the column of channel i in the calibration inputs and W_i its column in the weight:

    - random: uniform in [0, 1).
    - magnitude: ||W_i||_2.
    - wanda_sp: the mean over outputs j of |W_ji| ||X_i||_2, Wanda (arXiv 2306.11695) made structured as in FLAP.
    - flap: var(X_i) ||W_i||_2^2 (arXiv 2312.11983), with the population variance over tokens.

    FLAP compares layers by the scores that `standardised` makes of these. Its own code squares those of attention
    first; that is left out here.

    Args:
        baseline: Which score.
        moments: Of the projection's input.
        weight: (D_out, D), as `nn.Linear` stores it.
        generator: On the CPU; needed for random, not used otherwise.

    Returns:
        (D,) float64 scores on the weight's device.

    Raises:
        ValueError: If the baseline is unknown, shapes do not fit, random has no generator or flap no tokens.
    """
    if weight.ndim != 2 or moments.gram.shape != (weight.shape[1],) * 2:
        shapes = f"gram {tuple(moments.gram.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes} must be (D, D) and (D_out, D)")
    weight = weight.double()
    squares = moments.gram.diagonal().double().to(weight.device)
    if baseline == "random":
        if generator is None:
            raise ValueError("generator must be given for random, got None")
        return torch.rand(weight.shape[1], generator=generator, dtype=torch.float64).to(weight.device)
    if baseline == "magnitude":
        return weight.norm(dim=0)
    if baseline == "wanda_sp":
        return weight.abs().mean(dim=0) * squares.sqrt()
    if baseline == "flap":
        if moments.count < 1:
            raise ValueError(f"count must be at least 1, got {moments.count}")
        mean = moments.mean.double().to(weight.device)
        # Rounding leaves the variance of a channel that hardly varies below 0.
        variance = (squares / moments.count - mean.square()).clamp_min(0)
        return variance * weight.square().sum(dim=0)
    raise ValueError(f"baseline must be random, magnitude, wanda_sp or flap, got {baseline!r}")


def standardised(scores: Tensor) -> Tensor:
    """Scores of one layer on the scale on which FLAP compares layers (arXiv 2312.11983).

    Args:
        scores: (units,), channels or heads.

    Returns:
        (units,) float64, less their mean, over their population standard deviation; zeros where all are equal.
    """
    scores = scores.double()
    # Asked before the mean is taken: its rounding would be standardised to scores of size 1.
    if bool((scores == scores[0]).all()):
        return torch.zeros_like(scores)
    return (scores - scores.mean()) / scores.std(correction=0)
