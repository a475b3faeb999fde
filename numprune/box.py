"""The numerical score inside its box: the relaxed mask when no entry may leave [0, 1].

The problem is that of `numprune.newton`, with the bounds that a Newton step passes over,

    minimise 1/2 (1 - z)^T A (1 - z) + lambda/2 (<1, z> - r)^2   subject to   0 <= z <= 1,      r = (1 - rho) D.

In w = 1 - z and y = lambda (rho D - <1, w>) a mask is optimal exactly where some p, q >= 0 give

    A w - y 1 - p + q = 0,    <1, w> + y / lambda = rho D,    p_i w_i = 0,    q_i (1 - w_i) = 0.

1/lambda = 0 makes the middle one the budget itself, so a finite and an infinite lambda are one case. A primal-dual
interior-point method solves these equations with Mehrotra's predictor and corrector (Nocedal and Wright, "Numerical
Optimization", 2nd ed., section 16.6). Each iteration factors M = A + diag(p / w + q / (1 - w)) once.
"""

import math

import torch
from torch import Tensor

from numprune.cholesky import cholesky, damped_cholesky, solve
from numprune.errors import NumpruneError
from numprune.newton import curvature

_MOST_ITERATIONS = 100
# Relative duality gap and relative residuals at which a mask counts as optimal.
_TOLERANCE = 1e-9
# Where what is removed costs next to nothing, this share of the cost for A = I stands in for it.
_SMALLEST_COST = 1e-6
# Share of the way to the nearest bound that a step may go: on the bound itself M is infinite.
_SHARE_OF_WAY = 0.995


def box_score(
    gram: Tensor,
    weight: Tensor,
    ratio: float,
    *,
    penalty: float = math.inf,
    damping: float = 0.0,
    subject: str = "A",
) -> Tensor:
    """The relaxed mask z of one projection's input channels within [0, 1]: high is kept, low is pruned.

    Args:
        gram: (D, D), the second moments X^T X of the projection's input.
        weight: (D_out, D), as `nn.Linear` stores it.
        ratio: Share rho of the channels to remove, in (0, 1).
        penalty: Lambda, above 0; at infinity <1, z> = (1 - rho) D holds.
        damping: Added to the diagonal of A, relative to its mean; raised where A is too near to singular.
        subject: What is scored, for the log and errors.

    Returns:
        (D,) float64 scores in [0, 1]. Those on a bound reach it to within the tolerance, not exactly.

    Raises:
        ValueError: If shapes do not fit or an argument is out of range.
        NumpruneError: If the method does not converge.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be in (0, 1), got {ratio}")
    if not penalty > 0:
        raise ValueError(f"penalty must be above 0, got {penalty}")
    matrix = curvature(gram, weight)
    # Only for the damping, which it adds in place: rounding leaves A indefinite, and the problem must be convex.
    damped_cholesky(matrix, damping, subject=subject)
    scale = matrix.diagonal().mean().item()
    return _kept(matrix.div_(scale), ratio, scale / penalty, subject)


def _kept(matrix: Tensor, ratio: float, softness: float, subject: str) -> Tensor:
    """The optimal z for a positive definite A with mean diagonal 1; the softness is 1/lambda in the same unit."""
    channels = len(matrix)
    budget = ratio * channels
    # The optimum for A = I meets the budget, and p and q are chosen to suit it: only complementarity is left to reach.
    # 1 - w is a variable of its own (t): near 0 the difference would be rounding.
    start = budget / (channels + softness)
    w = torch.full((channels,), start, dtype=matrix.dtype, device=matrix.device)
    y = start
    excess = matrix @ w - y
    margin = start + excess.abs().mean()
    point = torch.stack([w, 1 - w, excess.clamp_min(0) + margin, (-excess).clamp_min(0) + margin])
    least_cost = _SMALLEST_COST * budget * start
    # What A w is exact to: the gradient is a small difference of large terms where masks cost next to nothing.
    rounding = torch.finfo(matrix.dtype).eps * channels * matrix.diagonal().max().item()
    for _ in range(_MOST_ITERATIONS):
        w, t, p, q = point
        gradient = matrix @ w
        stationarity = gradient - y - p + q
        shortfall = budget - w.sum().item() - softness * y
        gap = (w @ p + t @ q).item()
        cost = max(least_cost, (w @ gradient).item() + softness * y**2) / 2
        if (
            gap <= _TOLERANCE * cost
            and abs(shortfall) <= _TOLERANCE * budget
            and stationarity.abs().max().item() <= max(rounding, _TOLERANCE * gradient.abs().max().item())
        ):
            return t.clamp(0, 1)
        factor, info = cholesky(matrix + torch.diag(p / w + q / t))
        if info.item() != 0:
            break

        products = torch.stack([w * p, t * q])
        step, _ = _newton_step(
            factor, point, -products, stationarity=stationarity, shortfall=shortfall, softness=softness
        )
        w, t, p, q = point + _length(point, step) * step
        # What following the bounds alone would leave of the gap says how much to centre (Mehrotra's heuristic).
        left = (w @ p + t @ q).item() / gap
        mean = gap / (2 * channels)
        target = left**3 * mean - products - step[:2] * step[2:]
        step, step_y = _newton_step(
            factor, point, target, stationarity=stationarity, shortfall=shortfall, softness=softness
        )
        length = _length(point, step, _SHARE_OF_WAY)
        point = point + length * step
        y += length * step_y
    raise NumpruneError(
        f"the mask of {subject} did not converge in {_MOST_ITERATIONS} iterations, more damping may help"
    )


def _newton_step(
    factor: Tensor, point: Tensor, target: Tensor, *, stationarity: Tensor, shortfall: float, softness: float
) -> tuple[Tensor, float]:
    """The step of (w, t, p, q), (4, D), and of y that undoes the residuals and changes w p and t q by the target.

    The equations for w and y are M dw - dy 1 = b and <1, dw> + dy / lambda = shortfall: y is found first, by the Schur
    complement of M.
    """
    w, t, p, q = point
    change_p, change_q = target
    b = change_p / w - change_q / t - stationarity
    solved, u = solve(factor, torch.stack([b, torch.ones_like(b)], dim=1)).T
    step_y = (shortfall - solved.sum().item()) / (softness + u.sum().item())
    step_w = solved + step_y * u
    step = torch.stack([step_w, -step_w, (change_p - p * step_w) / w, (change_q + q * step_w) / t])
    return step, step_y


def _length(point: Tensor, step: Tensor, share: float = 1.0) -> float:
    """The part of a step, at most all of it, that goes no further than a share of the way to 0 and lowers the gap most.

    Along a step the gap is a parabola that opens upwards: the longest step may well raise it, and the method cycles.
    """
    to_bound = share * torch.where(step < 0, -point / step, math.inf).min().item()
    slope = (point[:2] * step[2:] + point[2:] * step[:2]).sum().item()
    bend = (step[:2] * step[2:]).sum().item()
    return min(1.0, to_bound, -slope / (2 * bend) if bend > 0 else 1.0)
