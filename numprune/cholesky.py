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
# Of moments from a handful of tokens no more than half gives way to the identity.
_MOST_SHRINKAGE = 0.5
# Columns that are factored at once. What is left of the work are products.
_PANEL = 512


def shrinkage(gram: Tensor, count: int) -> float:
    """How much damping calibration moments need, from their spectrum and the tokens behind them.

    The oracle approximating shrinkage of Chen, Wiesel, Eldar and Hero (2010), eq. 23: the weight with which a sample
    covariance is best mixed with a multiple of the identity. With few tokens for its effective rank it is large, with
    many it goes to zero.

    Args:
        gram: (D, D), the second moments X^T X of `count` rows.
        count: Tokens seen, at least 1.

    Returns:
        Damping relative to the mean diagonal, in [0, 1].
    """
    size = len(gram)
    squares = gram.double().square().sum().item()
    square = gram.diagonal().double().sum().item() ** 2
    spread = squares - square / size  # Of the eigenvalues about their mean; zero for a multiple of the identity.
    if spread <= 0:
        return 0.0
    weight = min(((1 - 2 / size) * squares + square) / ((count + 1 - 2 / size) * spread), _MOST_SHRINKAGE)
    return weight / (1 - weight)


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factors a symmetric positive definite matrix, panel by panel.

    PyTorch's own factorisation of a large matrix takes longer on a CPU: it copies the matrix across the order of its
    memory before.

    Args:
        matrix: (D, D).

    Returns:
        The lower factor, column by column in memory, as LAPACK has it; and a scalar, 0 if the matrix is definite.
    """
    if len(matrix) <= _PANEL:
        return torch.linalg.cholesky_ex(matrix)
    factor = matrix.clone(memory_format=torch.contiguous_format).T
    infos = []
    for start in range(0, len(matrix), _PANEL):
        end = start + _PANEL
        panel = factor[start:, start:end]
        panel.addmm_(factor[start:, :start], factor[start:end, :start].T, alpha=-1)
        top, info = torch.linalg.cholesky_ex(panel[:_PANEL].contiguous())
        infos.append(info)
        panel[:_PANEL] = top
        panel[_PANEL:] = torch.linalg.solve_triangular(top.T, panel[_PANEL:], upper=True, left=False)
        factor[:start, start:end] = 0
    return factor, torch.stack(infos).amax()


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """Solves L L^T X = B; unlike `torch.cholesky_solve` without a copy of the factor.

    Args:
        factor: (D, D), the lower one.
        right: (D, columns).

    Returns:
        (D, columns) X.
    """
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.T, half, upper=True)


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
        factor, info = cholesky(matrix)
        if info.item() == 0 and factor.diagonal().min().item() ** 2 > _SMALLEST_PIVOT * scale:
            break
        wanted = max(_FIRST_DAMPING, used * _GROWTH)
    if used > damping:
        _LOGGER.warning(
            "%s is near-singular: damped by %.0e of its mean diagonal (asked for %.0e)", subject, used, damping
        )
    return factor, used
