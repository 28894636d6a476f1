"""Compiled passes of Lloyd's algorithm on CPUs, which read each block of rows from memory once.

PyTorch takes six operations, each of which passes over its operands in memory. Here everything is
done while a block of rows, their products with the centres and the sums are in the core's cache.
The products themselves are computed by BLAS.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  # BLAS of compiled np.dot: load before thread limits are set
from numba import njit
from numpy.typing import NDArray

_BLOCK_ROWS = 128
_COPYING_COST = 2.0
"""Copying a row takes as long as its products with this many centres. If copying costs more than it
saves, all rows of a block are processed in place."""
_BOUNDS_ROUNDING = 1e-4
"""Relative margin of bounds: the rounding of some hundred float32 additions is smaller."""

Array = NDArray[Any]


@cache
def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function of this module; not on import, as Numba then creates its cache folder."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no writable cache folder: compiled again by every process
        return njit(nogil=True, error_model="numpy")(function)


def measure_rows(
    x: Array,  # (n, D) float32 or float64
    norms: Array,  # (n,) of the rows: output
    total: Array,  # (D,) float64, to which the rows are added
) -> None:
    """Compute the norms of the rows and add up the rows."""
    for i in range(len(x)):
        norms[i] = np.sqrt(_square(x[i]))
        _add(x[i], total)


def centre_rows(
    x: Array,  # (n, D)
    origin: Array,  # (D,)
    centred: Array,  # (n, D): output
    norms: Array,  # (n,) of the centred rows: output
) -> None:
    """Subtract an origin from the rows, and compute the new norms."""
    for i in range(len(x)):
        _subtract(x[i], origin, centred[i])
        norms[i] = np.sqrt(_square(centred[i]))


def move_rows(
    x: Array,  # (n, D) float32 or float64, C-contiguous
    row_squares: Array,  # (n,) squared norms of the rows
    labels: Array,  # (n,) int64, of the last pass, or -1; updated, like all down to `counts`
    upper: Array,  # (n,) upper bound of the distance to the row's own centre, initially infinite
    lower: Array,  # (n,) lower bound of the distance to any other centre
    sums: Array,  # (K, D) float64, sum of the rows of each cluster
    counts: Array,  # (K,) float64
    factors: Array,  # (D, K): -2 times the centres, transposed
    squares: Array,  # (K,) squared norms of the centres
    shifts: Array,  # (K,) shift of each centre since the last pass
    other_shifts: Array,  # (K,) largest shift of the other centres
    slack: Array,  # (1,) maximum error of squared distances in the rows' dtype
) -> int:
    """Move rows to their nearest centres, update the sums, and return how many rows moved.

    In a tie with its current centre, a row stays. Rows that certainly stay are skipped (Hamerly
    2010, "Making k-means even faster": if a centre moves by s, its distances change by at most s;
    Hamerly's bound by the distances between centres is omitted, as it rarely helps in many
    dimensions).
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


# Operations on rows (D,). Separate functions, as a loop that indexes its row is not vectorised.


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


@njit(nogil=True, error_model="numpy", fastmath={"reassoc"})  # any order, to vectorise
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
    """Scores (K, n), squared distances minus the rows' squared norms, and the minima of the rows.

    Centres are in the outer loop, so that the comparison is vectorised over rows.
    """
    num_rows, num_clusters = len(rows), len(squares)
    by_row = products[: num_rows * num_clusters].reshape(num_rows, num_clusters)
    np.dot(rows, factors, by_row)
    least[:] = np.inf
    second[:] = np.inf
    nearest[:] = 0  # a valid index even if no score is below infinity
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
