"""Which models no other is better than in both of two respects."""

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other dominates, by rising first coordinate.

    Args:
        points: Two numbers each, both the better the lower. A point dominates another if it is as good in both and
            better in one.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        best = points[front[-1]] if front else None
        if best is None or points[index][1] < best[1] or points[index] == best:
            front.append(index)
    return front
