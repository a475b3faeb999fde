"""The numerical score: how much of each input channel a Newton step keeps (paper, section "Numerical score").

For y = xW and calibration inputs X the 0/1 mask over the D input channels is relaxed to z, which minimises

    1/2 ||XW - X diag(z) W||_F^2 + lambda/2 (<1, z> - r)^2,        r = (1 - rho) D.

With A = (W W^T) o (X^T X) the gradient is A(z - 1) + lambda(<1, z> - r) 1 and the Hessian A + lambda 1 1^T. The
objective is quadratic, so one Newton step from anywhere reaches the stationary point, which has a closed form:

    z = 1 - rho d,    d = lambda D u / (1 + lambda s),    u = A^-1 1,    s = <1, u>.

The direction d does not depend on the ratio rho: one Cholesky factorisation serves every ratio.
"""

import math

import torch
from torch import Tensor

from numprune.cholesky import damped_cholesky, solve
from numprune.second_moments import SecondMoments, products


def newton_direction(
    gram: Tensor, weight: Tensor, *, penalty: float = math.inf, damping: float = 0.0, subject: str = "A"
) -> tuple[Tensor, float]:
    """The direction d in which the mask leaves 1 as the ratio grows.

    Args:
        gram: (D, D), the second moments X^T X of the projection's input.
        weight: (D_out, D), as `nn.Linear` stores it.
        penalty: Lambda, above 0; infinity takes the limit, in which <1, z> = r holds exactly.
        damping: Added to the diagonal of A, relative to its mean; raised where A is too near to singular.
        subject: What is scored, for the log.

    Returns:
        (D,) float64 direction, and the damping that was used.

    Raises:
        ValueError: If shapes do not fit or an argument is out of range.
    """
    matrix = curvature(gram, weight)
    if not penalty > 0:
        raise ValueError(f"penalty must be above 0, got {penalty}")
    channels = weight.shape[1]
    factor, used = damped_cholesky(matrix, damping, subject=subject)
    ones = torch.ones(channels, 1, dtype=torch.float64, device=weight.device)
    u = solve(factor, ones).squeeze(1)
    # 1/lambda + s instead of (1 + lambda s)/lambda: it holds at infinity too.
    return channels * u / (1 / penalty + u.sum()), used


def numerical_score(
    gram: Tensor, weight: Tensor, ratio: float, penalty: float = math.inf, damping: float = 0.0
) -> Tensor:
    """The relaxed mask z of one projection's input channels: high is kept, low is pruned.

    Args:
        gram: (D, D), the second moments X^T X of the projection's input.
        weight: (D_out, D), as `nn.Linear` stores it.
        ratio: Share rho of the channels to remove, in (0, 1).
        penalty: Lambda, above 0; infinity takes the limit, in which <1, z> = (1 - rho) D holds exactly.
        damping: Added to the diagonal of A, relative to its mean; raised where A is too near to singular.

    Returns:
        (D,) float64 scores.

    Raises:
        ValueError: If shapes do not fit or an argument is out of range.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be in (0, 1), got {ratio}")
    direction, _ = newton_direction(gram, weight, penalty=penalty, damping=damping)
    return 1 - ratio * direction


def curvature(gram: Tensor, weight: Tensor) -> Tensor:
    """The curvature A of the output error in the mask, without the penalty's share.

    Args:
        gram: (D, D), the second moments X^T X of the projection's input.
        weight: (D_out, D), as `nn.Linear` stores it.

    Returns:
        (D, D) float64, (W W^T) o (X^T X), a new tensor.

    Raises:
        ValueError: If shapes do not fit.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be (D_out, D), got {tuple(weight.shape)}")
    if gram.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"gram must be {(weight.shape[1],) * 2} to fit the weight, got {tuple(gram.shape)}")
    moments = SecondMoments(len(gram), weight.device)
    moments.add(products(weight.double()))
    return moments.total().mul_(gram)
