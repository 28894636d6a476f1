"""Passes of Lloyd's algorithm on processors, compiled: a block of rows is read once, from cache.

What PyTorch does in six operations, each of which passes over its operands in memory, happens here
while a block of rows, their products with the centres and the sums are in a core's cache. The
products themselves are BLAS's.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  # what np.dot becomes: loaded before threads are counted
from numba import njit
from numpy.typing import NDArray

_BLOCK_ROWS = 128
_COPYING_COST = 2.0
"""To copy a row takes as long as its products with so many centres: if more would be copied than
that saves, all of a block's rows are looked at where they lie."""
_BOUNDS_ROUNDING = 1e-4
"""Relative margin of bounds: some hundred float32 additions round by less."""

Array = NDArray[Any]


@cache
def compiled(function: Callable[..., Any]) -> Any:
    """One of these functions: not on import, since Numba makes the folder of its cache at once."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no folder may be written to: compiled anew by every process
        return njit(nogil=True, error_model="numpy")(function)


def measure_rows(
    x: Array,  # (n, D) float32 or float64
    norms: Array,  # (n,) of the rows: written
    total: Array,  # (D,) float64, to which the rows are added
) -> None:
    """The rows' norms and their sum."""
    for i in range(len(x)):
        norms[i] = np.sqrt(_square(x[i]))
        _add(x[i], total)


def centre_rows(
    x: Array,  # (n, D)
    origin: Array,  # (D,)
    centred: Array,  # (n, D): written
    norms: Array,  # (n,) of the centred rows: written
) -> None:
    """The rows relative to an origin, and their norms then."""
    for i in range(len(x)):
        _subtract(x[i], origin, centred[i])
        norms[i] = np.sqrt(_square(centred[i]))


def move_rows(
    x: Array,  # (n, D) float32 or float64, C-contiguous
    row_squares: Array,  # (n,) of the rows' norms
    labels: Array,  # (n,) int64, of the last pass, or -1; updated, as all to `counts` are
    upper: Array,  # (n,) bound of the distance to the row's own centre, infinite at first
    lower: Array,  # (n,) bound of the distance to any other
    sums: Array,  # (K, D) float64, of the rows of each cluster
    counts: Array,  # (K,) float64
    factors: Array,  # (D, K): -2 times the centres, transposed
    squares: Array,  # (K,) of the centres' norms
    shifts: Array,  # (K,) how far each centre has moved since the last pass
    other_shifts: Array,  # (K,) and the farthest of the others
    slack: Array,  # (1,) what squared distances may be wrong by in the rows' dtype
) -> int:
    """Move rows to their nearest centres, and what they sum to; how many moved.

    A row that is as near to its own centre as to any stays. Rows that certainly stay are passed
    over (Hamerly 2010, "Making k-means even faster": a centre that has moved by s is nearer or
    farther by s at most; his bound by the distances between centres is left out, for it seldom
    decides in many dimensions).
    """
    num_features, num_clusters = factors.shape
    products = np.empty(_BLOCK_ROWS * num_clusters, x.dtype)
    scores = np.empty((num_clusters, _BLOCK_ROWS), x.dtype)
    least = np.empty(_BLOCK_ROWS, x.dtype)
    second = np.empty(_BLOCK_ROWS, x.dtype)
    nearest = np.empty(_BLOCK_ROWS, np.int64)
    places = np.empty(_BLOCK_ROWS, np.int64)
    copies = np.empty((_BLOCK_ROWS, num_features), x.dtype)
    zero = x.dtype.type(0)
    wider, narrower = x.dtype.type(1 + _BOUNDS_ROUNDING), x.dtype.type(1 - _BOUNDS_ROUNDING)
    num_moved = 0
    for start in range(0, len(x), _BLOCK_ROWS):
        rows = x[start : start + _BLOCK_ROWS]
        num_undecided = 0
        for i in range(start, start + len(rows)):
            label = labels[i]
            if label >= 0:
                upper[i] += shifts[label]
                lower[i] -= other_shifts[label]
            places[num_undecided] = i
            num_undecided += upper[i] >= lower[i]
        if num_undecided == 0:
            continue
        if num_undecided * (num_clusters + _COPYING_COST) > len(rows) * num_clusters:
            for i in range(len(rows)):
                places[i] = start + i
        else:
            for i in range(num_undecided):
                _copy(x[places[i]], copies[i])
            rows = copies[:num_undecided]
        _score(rows, factors, squares, products, scores, least, second, nearest)
        for i in range(len(rows)):
            place = places[i]
            source, target = labels[place], nearest[i]
            others = second[i]
            if source < 0 or least[i] < scores[source, i]:
                labels[place] = target
                counts[target] += 1
                _add(rows[i], sums[target])
                if source >= 0:
                    counts[source] -= 1
                    _subtract(sums[source], rows[i], sums[source])
                num_moved += 1
            elif source != target:  # a tie
                others = least[i]
            square = row_squares[place]
            upper[place] = np.sqrt(max(least[i] + square + slack[0], zero)) * wider
            lower[place] = np.sqrt(max(others + square - slack[0], zero)) * narrower
    return num_moved


# Operations on rows (D,). Apart, since a loop that reads its row's place anew is not vectorised.


@njit(nogil=True, error_model="numpy")
def _copy(row: Array, to: Array) -> None:
    for d in range(len(row)):
        to[d] = row[d]


@njit(nogil=True, error_model="numpy")
def _add(row: Array, total: Array) -> None:
    for d in range(len(row)):
        total[d] += row[d]


@njit(nogil=True, error_model="numpy")
def _subtract(row: Array, other: Array, to: Array) -> None:
    for d in range(len(row)):
        to[d] = row[d] - other[d]


@njit(nogil=True, error_model="numpy", fastmath={"reassoc"})  # in any order: many at a time
def _square(row: Array) -> Any:
    square = row.dtype.type(0)
    for d in range(len(row)):
        square += row[d] * row[d]
    return square


@njit(nogil=True, error_model="numpy")
def _score(
    rows: Array,  # (n, D)
    factors: Array,
    squares: Array,
    products: Array,
    scores: Array,
    least: Array,
    second: Array,
    nearest: Array,
) -> None:
    """Squared distances less the rows' own squares, into scores (K, n), and the least of each row.

    Centres in the outer loop: so rows are compared many at a time.
    """
    num_rows, num_clusters = len(rows), len(squares)
    by_row = products[: num_rows * num_clusters].reshape(num_rows, num_clusters)
    np.dot(rows, factors, by_row)
    least[:] = np.inf
    second[:] = np.inf
    nearest[:] = 0  # a place to write to, also where no score is below infinity
    for k in range(num_clusters):
        square = squares[k]
        for i in range(num_rows):
            scores[k, i] = by_row[i, k] + square
        for i in range(num_rows):
            score = scores[k, i]
            best = least[i]
            larger = score if score > best else best
            second[i] = larger if larger < second[i] else second[i]
            nearest[i] = k if score < best else nearest[i]
            least[i] = score if score < best else best
