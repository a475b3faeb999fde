"""Removal in the Optimal Brain Surgeon sense: which units go first, and what their absence costs a projection.

With G = X^T X of a projection's inputs, H = G + gamma I and W the weight in the orientation y = xW, removing the inputs
P and letting the others take over their work at best costs

    L(P) = tr(W_P^T [(H^-1)_PP]^-1 W_P),

a squared error over all tokens. The greedy order removes what is cheapest, then passes on to the smaller problem,

    W <- W - H^-1_:P [(H^-1)_PP]^-1 W_P,        H^-1 <- H^-1 - H^-1_:P [(H^-1)_PP]^-1 H^-1_P: .

For an order that is given, one Cholesky factor shows every loss: with the inputs sorted so that those that go last come
first and H = L L^T, the loss after the last k are gone is the squared norm of the last k rows of L^T W.
"""

import torch
from torch import Tensor

from numprune.architectures import channel_indices
from numprune.cholesky import damped_cholesky


def removal_order(
    gram: Tensor, weight: Tensor, *, channels: int = 1, damping: float = 0.0, at_once: int = 1, subject: str = "G"
) -> Tensor:
    """The greedy order in which units leave a projection.

    Args:
        gram: (D, D), the second moments X^T X of the projection's input.
        weight: (D_out, D), as `nn.Linear` stores it.
        channels: Consecutive inputs that make one unit.
        damping: Gamma relative to the mean diagonal of G; raised where G is too near to singular.
        at_once: Units that go before costs are computed anew.
        subject: What is ranked, for the log.

    Returns:
        (units,) indices, the first to go first.

    Raises:
        ValueError: If shapes do not fit or an argument is out of range.
    """
    units = _check(gram, weight, channels)
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1, got {at_once}")
    factor, _ = damped_cholesky(gram.double().clone(), damping, subject=subject)
    inverse = torch.cholesky_inverse(factor)
    del factor
    rest = weight.double().T.clone()
    alive = torch.arange(units, device=weight.device)
    order = []
    while len(alive):
        # Indices instead of masks: sizes are known, so a GPU is never waited for.
        gone = _costs(inverse, rest, channels).argsort(stable=True)[:at_once]
        order.append(alive[gone])
        columns = channel_indices(gone, channels)
        across, weights = inverse[:, columns], rest[columns]
        free, movers = _places(gone, len(alive))
        alive = _move(alive, free, movers)[: -len(gone)]
        free, movers, size = channel_indices(free, channels), channel_indices(movers, channels), len(alive) * channels
        pivot = across[columns]
        across = _move(across, free, movers)[:size]
        # Not `solve`, which waits to see whether the matrix is singular: it is definite, as G was damped until it was.
        taken = torch.linalg.solve_ex(pivot, across, left=False).result
        # In place, on the leading part: a new matrix of this size costs more than the products.
        inverse = _move(_move(inverse, free, movers).T, free, movers).T[:size, :size].addmm_(taken, across.T, alpha=-1)
        rest = _move(rest, free, movers)[:size].addmm_(taken, weights, alpha=-1)
    return torch.cat(order)


def _places(gone: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where the last of `count` units move, so that those that stay are in front.

    Returns:
        The places that become free and the units that move there, in pairs. As many as are gone: of those that are
        last themselves, place and unit are the same.
    """
    last = torch.arange(count - len(gone), count, device=gone.device)
    stays = (last[:, None] != gone).all(dim=1)
    return gone.sort().values, last[stays.argsort(stable=True, descending=True)]


def _move(rows: Tensor, places: Tensor, movers: Tensor) -> Tensor:
    return rows.index_copy_(0, places, rows[movers])


def _costs(inverse: Tensor, rest: Tensor, channels: int) -> Tensor:
    """tr(W_u^T [(H^-1)_uu]^-1 W_u) of every unit u."""
    if channels == 1:
        return rest.square().sum(dim=1) / inverse.diagonal()
    units = len(rest) // channels
    blocks = inverse.view(units, channels, units, channels).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    weights = rest.view(units, channels, -1)
    return (torch.linalg.solve_ex(blocks, weights).result * weights).sum(dim=(1, 2))


def loss_curve(
    gram: Tensor, weight: Tensor, order: Tensor, *, channels: int = 1, damping: float = 0.0, subject: str = "G"
) -> Tensor:
    """What is lost at best when units leave a projection in a given order.

    Args:
        gram: (D, D), the second moments X^T X of the projection's input.
        weight: (D_out, D), as `nn.Linear` stores it.
        order: (units,) indices, the first to go first.
        channels: Consecutive inputs that make one unit.
        damping: Gamma relative to the mean diagonal of G; raised where G is too near to singular.
        subject: What is measured, for the log.

    Returns:
        (units + 1,) float64: entry k is the squared error, as a share of the projection's squared output, after the
        first k units are gone. It begins with 0 and never falls.

    Raises:
        ValueError: If shapes do not fit or an argument is out of range.
    """
    units = _check(gram, weight, channels)
    inputs = channel_indices(order.flip(0), channels)
    factor, _ = damped_cholesky(gram.double()[inputs][:, inputs], damping, subject=subject)
    losses = (factor.T @ weight.double()[:, inputs].T).square().sum(dim=1)
    losses = losses.view(units, channels).sum(dim=1).flip(0).cumsum(0)
    return torch.cat([losses.new_zeros(1), losses / losses[-1].clamp_min(torch.finfo(losses.dtype).tiny)])


def _check(gram: Tensor, weight: Tensor, channels: int) -> int:
    if weight.ndim != 2 or gram.shape != (weight.shape[1],) * 2:
        raise ValueError(f"gram {tuple(gram.shape)} and weight {tuple(weight.shape)} must be (D, D) and (D_out, D)")
    if channels < 1 or weight.shape[1] % channels:
        raise ValueError(f"channels must be a divisor of {weight.shape[1]}, got {channels}")
    return weight.shape[1] // channels
