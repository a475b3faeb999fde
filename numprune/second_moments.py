"""Sums of X^T X over batches of rows, the second moments that scores and compensation are made of."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Columns of a symmetric product that are computed together, each with the rows from its own on: of 8192 columns
# that is five eighths of the work. Narrower stripes save more, until the products are too small to be fast.
_STRIPE = 2048


def product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right over (N, ...) rows: a share of second moments, accumulated in at least float32.

    In bfloat16 and float16 a GPU's tensor cores take the rows as they are: the products are exact in float32, in which
    they are added up. Elsewhere rows are multiplied in float32, without TF32, or in float64 if they are.
    """
    if left.is_cuda and left.dtype == right.dtype and left.dtype in {torch.bfloat16, torch.float16}:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    precision = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return left.to(precision).T @ right.to(precision)


def products(rows: Tensor) -> list[Tensor]:
    """X^T X of (N, D) rows from the diagonal down, in stripes of columns; see `product`."""
    if not rows.is_cuda:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # Once for all stripes.
    return [product(rows[:, start:], rows[:, start : start + _STRIPE]) for start in range(0, rows.shape[1], _STRIPE)]


class SecondMoments:
    """A (D, D) sum of X^T X in float64. It is symmetric: what is above the diagonal is filled in at the end."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, stripes: Sequence[Tensor]) -> None:
        """Adds the `products` of a batch of rows."""
        for number, stripe in enumerate(stripes):
            start = number * _STRIPE
            self._sum[start:, start : start + _STRIPE] += stripe

    def total(self) -> Tensor:
        """The whole sum; nothing is added after."""
        for start in range(0, len(self._sum), _STRIPE):
            end = start + _STRIPE
            self._sum[start:end, end:] = self._sum[end:, start:end].T
        return self._sum
