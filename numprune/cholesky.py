"""Cholesky factors of matrices that calibration leaves near-singular."""

import logging
import math

import torch
from torch import Tensor

_LOGGER = logging.getLogger(__name__)

# Where a factorisation fails, damping starts here and grows by this factor.
_FIRST_DAMPING = 1e-8
_GROWTH = 10.0
# A squared pivot below this share of the mean diagonal is rounding, and what is solved with it is noise.
_SMALLEST_PIVOT = 1e-13


def damped_cholesky(matrix: Tensor, damping: float, *, subject: str) -> tuple[Tensor, float]:
    """Factors a symmetric positive semi-definite matrix, adding to its diagonal what that takes.

    Args:
        matrix: (D, D), float64; the damping is added in place.
        damping: Share of the mean diagonal to add; raised until the factorisation succeeds.
        subject: What the matrix is, for the log.

    Returns:
        The lower factor, and the damping that was used.

    Raises:
        ValueError: If the damping is negative or the matrix is not finite.
    """
    if damping < 0:
        raise ValueError(f"damping must be at least 0, got {damping}")
    diagonal = matrix.diagonal()
    scale = diagonal.mean().item()
    if not math.isfinite(scale):
        raise ValueError(f"{subject} is not finite")
    if scale <= 0:  # All zero: nothing was ever measured here, and any positive diagonal is as good as another.
        scale = 1.0
    used = 0.0
    wanted = damping
    while True:
        diagonal.add_((wanted - used) * scale)
        used = wanted
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info.item() == 0 and factor.diagonal().min().item() ** 2 > _SMALLEST_PIVOT * scale:
            break
        wanted = max(_FIRST_DAMPING, used * _GROWTH)
    if used > damping:
        _LOGGER.warning(
            "%s is near-singular: damped by %.0e of its mean diagonal (asked for %.0e)", subject, used, damping
        )
    return factor, used
