"""How far two orders of the same things agree; pure functions of lists of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """1 for the smallest to n for the largest, float64 [n]; equal values share the mean of their ranks."""
    _, group, sizes = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = sizes.cumsum()
    mean_ranks: NDArray[np.float64] = (last - (sizes - 1) / 2)[group]
    return mean_ranks


def spearman(values: Sequence[float], others: Sequence[float], given: Sequence[Sequence[float]] = ()) -> float:
    """The correlation of the ranks, in [-1, 1]; with `given` of what their ranks leave unexplained (a partial correlation).

    Args:
        values, others: n numbers each.
        given: more lists of n numbers, whose ranks are regressed out of both first.

    Returns:
        0 where nothing is left to vary: all values equal, or all explained by `given`.

    Raises:
        ValueError: lists of different lengths.
    """
    columns = [ranks(column) for column in (values, others, *given)]
    if len({column.size for column in columns}) > 1:
        raise ValueError(f"lists of {[column.size for column in columns]} numbers; they must be of the same things")
    basis = explained(columns[2:], columns[0].size)
    return float(left(columns[0], basis) @ left(columns[1], basis))


def explained(columns: Sequence[NDArray[np.float64]], size: int) -> NDArray[np.float64]:
    """An orthonormal basis, [size, at most 1 + the number of columns], of what a constant and the columns explain."""
    directions, lengths, _ = np.linalg.svd(np.stack([np.ones(size), *columns], axis=1), full_matrices=False)
    basis: NDArray[np.float64] = directions[:, lengths > 1e-12 * lengths[0]]
    return basis


def left(column: NDArray[np.float64], basis: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the basis leaves unexplained of a column, as a vector of length 1; zeros where it leaves nothing."""
    residual: NDArray[np.float64] = column - basis @ (basis.T @ column)
    # Residuals of what is explained in full are rounding: some 1e-16 of the ranks per addition.
    norm = float(np.linalg.norm(residual))
    return residual / norm if norm > 1e-9 * float(np.linalg.norm(column)) else np.zeros_like(residual)


def top(values: Sequence[float], share: float) -> set[int]:
    """Indices of the `floor(share * n + 1e-9)` largest values. Ties go to the lower index, as they do for protected tokens."""
    count = math.floor(share * len(values) + 1e-9)
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def top_overlap(values: Sequence[float], others: Sequence[float], share: float) -> float:
    """Share of the top `share` by `values` that is in the top by `others` too, in [0, 1]; chance gives about `share`.

    Raises:
        ValueError: lists of different lengths, or so short that the top is empty.
    """
    if len(values) != len(others) or share * len(values) + 1e-9 < 1:
        raise ValueError(
            f"lists of {len(values)} and {len(others)} numbers and share={share}; the lists must be of the same things and the "
            "top must hold at least one"
        )
    best = top(values, share)
    return len(best & top(others, share)) / len(best)
