"""Compensation: the kept inputs of an output projection take over the work of the pruned ones.

With P the pruned and K the kept inputs and G = X^T X, the minimiser of ||X(W + dW) - XW||^2 under (W + dW)_P = 0 is
the paper's

    dW = -(2G)^-1 M_p (M_p^T (2G)^-1 M_p)^-1 M_p^T W,

which is least squares on the kept inputs,

    W_K <- W_K + (G_KK + gamma I)^-1 G_KP W_P :

one Cholesky factorisation of |K| x |K| instead of an inverse of D x D.

FLAP (arXiv 2312.11983) leaves W_K alone and adds what the pruned inputs give on average, mean(X_P) W_P, as a bias.
"""

import torch
from torch import Tensor

from numprune.cholesky import damped_cholesky, solve


def compensate(gram: Tensor, weight: Tensor, keep: Tensor, damping: float = 0.0, *, subject: str = "G_KK") -> Tensor:
    """The weight on the kept inputs that best reproduces the whole projection on the calibration inputs.

    Args:
        gram: (D, D), the second moments X^T X of the projection's input.
        weight: (D_out, D), as `nn.Linear` stores it.
        keep: The kept inputs: indices in the order they are wanted, or a (D,) boolean mask.
        damping: Gamma relative to the mean diagonal of G_KK; raised where G_KK is too near to singular.
        subject: What is compensated, for the log.

    Returns:
        (D_out, |K|) weight, in the type of `weight`.

    Raises:
        ValueError: If shapes do not fit, nothing is kept, or an index is out of range or repeated.
    """
    channels = weight.shape[1]
    if gram.shape != (channels, channels):
        raise ValueError(f"gram must be {(channels, channels)} to fit the weight, got {tuple(gram.shape)}")
    kept, pruned = _partition(keep.to(weight.device), channels)
    if not pruned.numel():
        return weight[:, kept]
    rows, exact = gram.to(weight.device)[kept], weight.double()
    across = rows[:, pruned].double() @ exact[:, pruned].T
    rows = rows[:, kept].double()
    factor, _ = damped_cholesky(rows, damping, subject=subject)
    del rows  # It has no room beside the factor and what is solved with it.
    return (exact[:, kept] + solve(factor, across).T).to(weight.dtype)


def bias_compensation(mean: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """The mean output of the pruned inputs, which a bias can give in their place.

    Args:
        mean: (D,), of the projection's input over tokens.
        weight: (D_out, D), as `nn.Linear` stores it.
        keep: The kept inputs: indices, or a (D,) boolean mask.

    Returns:
        (D_out,) bias, in the type of `weight`.

    Raises:
        ValueError: If shapes do not fit, nothing is kept, or an index is out of range or repeated.
    """
    channels = weight.shape[1]
    if mean.shape != (channels,):
        raise ValueError(f"mean must be ({channels},) to fit the weight, got {tuple(mean.shape)}")
    _, pruned = _partition(keep.to(weight.device), channels)
    return (weight[:, pruned].double() @ mean.to(weight.device, torch.float64)[pruned]).to(weight.dtype)


def _partition(keep: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    if keep.dtype == torch.bool:
        if keep.shape != (channels,):
            raise ValueError(f"a boolean keep must be ({channels},), got {tuple(keep.shape)}")
        keep = keep.nonzero().squeeze(1)
    if not keep.numel():
        raise ValueError("keep is empty: at least one input must stay")
    if keep.min() < 0 or keep.max() >= channels:
        raise ValueError(f"keep must lie in [0, {channels}), got {keep.min().item()} to {keep.max().item()}")
    mask = torch.ones(channels, dtype=torch.bool, device=keep.device)
    mask[keep] = False
    pruned = mask.nonzero().squeeze(1)
    if len(pruned) + len(keep) != channels:
        raise ValueError("keep holds an index twice")
    return keep, pruned
