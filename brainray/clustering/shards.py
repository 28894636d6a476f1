"""Functions of rows that are distributed over ranks, with the same result on every rank.

Throughout, `x` (n_rank, D) is this rank's shard, which may be empty; N is the number of rows on
all ranks together. Functions that use a collective are marked as such.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from brainray import dist
from brainray.errors import ClusteringError

ROWS_AT_A_TIME = 16_384
"""Block size where a float64 copy limits memory."""

# Sums of squared distances below this share of the rows' sum of squares, or of their squared
# distances to their mean, are rounding errors.
IDENTICAL_ROWS_RATIO = 1e-24

_CACHED_NUMBERS = 2**20  # numbers that fit the CPU cache
_NUMBERS_ON_GPU = 2**26  # launching many small blocks would dominate
_MIN_BLOCK_ROWS = 256

_SUMMED_ROWS = 4096  # converted to float64 at a time: they fit the CPU cache


class TopRows(NamedTuple):
    """Rows of all ranks with the largest scores, best first."""

    rows: Tensor  # (M, D)
    scores: Tensor  # (M,)


def blocks(num_rows: int, block_rows: int) -> Iterator[slice]:
    """Consecutive slices of at most ``block_rows`` rows that cover ``num_rows`` rows."""
    for start in range(0, num_rows, block_rows):
        yield slice(start, min(start + block_rows, num_rows))


def cached_blocks(x: Tensor, numbers_per_row: int) -> Iterator[slice]:
    """Consecutive slices that cover the rows x (n, D) and whose numbers fit the CPU cache."""
    return blocks(len(x), rows_of_block(numbers_per_row, x.device))


def rows_of_block(numbers_per_row: int, device: torch.device) -> int:
    """Number of rows per block; a GPU's memory takes larger ones than a CPU's cache."""
    numbers = _CACHED_NUMBERS if device.type == "cpu" else _NUMBERS_ON_GPU
    return max(numbers // numbers_per_row, _MIN_BLOCK_ROWS)


def check_form(x: Tensor) -> None:
    """
    Raises:
        ClusteringError: `x` is not a float32 or float64 matrix.
    """
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.float64):
        raise ClusteringError(
            f"clustering needs a float32 or float64 matrix (rows, features), got {x.dtype} of "
            f"shape {tuple(x.shape)}: convert or reshape the embeddings"
        )


def check_rows(x: Tensor, total: Tensor | None = None) -> int:
    """Number of rows N on all ranks (collective).

    Args:
        x: (n_rank, D) this rank's rows.
        total: this rank's `sum_of_rows`, if already known.

    Raises:
        ClusteringError: on all ranks: any rank has a row with NaN or infinity, or `x` is not a
            float32 or float64 matrix.
    """
    check_form(x)
    # If the sum is finite, so are all terms; rows are only checked if it is not.
    clean = bool(torch.isfinite((x if total is None else total).sum()))
    num_bad = x.new_zeros(()) if clean else (~torch.isfinite(x).all(dim=1)).sum()
    local = torch.stack([torch.tensor(x.shape[0], device=x.device), num_bad.long()])
    num_rows, num_bad_rows = (int(count) for count in dist.sum_across_ranks(local))
    if num_bad_rows:
        raise ClusteringError(
            f"{num_bad_rows} of {num_rows} rows contain NaN or infinity: training has diverged "
            "(lower the learning rate) or an input image was not standardised"
        )
    return num_rows


def resolve_row_keys(x: Tensor, row_keys: Tensor | None) -> Tensor:
    """Keys (n_rank,) int64, unique over all ranks; by default global row indices (collective).

    Keys make random draws and ties independent of the rank that has a row.
    """
    if row_keys is None:
        num_rows = dist.gather_rows(torch.tensor([x.shape[0]], device=x.device))
        first = int(num_rows[: dist.rank()].sum())
        return torch.arange(first, first + x.shape[0], device=x.device)
    if row_keys.shape != (x.shape[0],) or row_keys.dtype != torch.int64:
        raise ClusteringError(
            f"row_keys must be int64 of shape ({x.shape[0]},), one key per row, got "
            f"{row_keys.dtype} of shape {tuple(row_keys.shape)}"
        )
    row_keys = row_keys.to(x.device)
    everyones = dist.gather_rows(row_keys)
    num_repeated = everyones.shape[0] - torch.unique(everyones).shape[0]
    if num_repeated:
        raise ClusteringError(
            f"{num_repeated} of {everyones.shape[0]} row_keys repeat another: each row needs a "
            "unique key, also across ranks and splits"
        )
    return row_keys


def mean_of_rows(x: Tensor, num_rows: int) -> Tensor:
    """Mean (D,) float64 of the N = `num_rows` rows of all ranks (collective)."""
    return dist.sum_across_ranks(sum_of_rows(x)) / num_rows


def sum_of_rows(x: Tensor) -> Tensor:
    """Sum (D,) float64 of this rank's rows."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for block in blocks(x.shape[0], _SUMMED_ROWS):
        total += x[block].double().sum(dim=0)
    return total


def scatter_of_rows(x: Tensor, mean: Tensor) -> Tensor:
    """Sum over all rows of (x - mean)(x - mean)^T, (D, D) float64 (collective).

    Two passes (mean first), as the one-pass formula loses all precision far from the origin.
    """
    scatter = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for block in blocks(x.shape[0], ROWS_AT_A_TIME):
        rows = x[block].double() - mean
        scatter.addmm_(rows.T, rows)
    return dist.sum_across_ranks(scatter)


def nearest_centers(x: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest of the centres (K, D) float64, (n,) int64, for rows (n, D), in blocks.

    Rows and centres are shifted to the centres' mean, because squared distances lose precision far
    from the origin.
    """
    origin = centers.mean(dim=0).to(x.dtype)
    shifted = (centers - origin).to(x.dtype)
    squares = shifted.square().sum(dim=1)
    nearest = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    for block in cached_blocks(x, x.shape[1] + len(centers)):
        scores = torch.addmm(squares, x[block] - origin, shifted.T, alpha=-2)
        nearest[block] = scores.argmin(dim=1)
    return nearest


def top_rows(x: Tensor, scores: Tensor, row_keys: Tensor, count: int) -> TopRows:
    """The `count` rows with the largest scores on all ranks, best first (collective).

    Ties are broken by the smaller key, so the result does not depend on the sharding. Fewer than
    `count` are returned only if there are fewer rows in total.
    """
    if scores.shape[0] > count:
        # Keep all ties with the last place, so that keys decide, not positions.
        kept = torch.nonzero(scores >= scores.topk(count).values[-1]).squeeze(1)
        kept = kept[_best_first(scores[kept], row_keys[kept])[:count]]
        x, scores, row_keys = x[kept], scores[kept], row_keys[kept]
    rows, scores, row_keys = map(dist.gather_rows, (x, scores, row_keys))
    order = _best_first(scores, row_keys)[:count]
    return TopRows(rows[order], scores[order])


def _best_first(scores: Tensor, row_keys: Tensor) -> Tensor:
    by_key = torch.argsort(row_keys)
    return by_key[torch.argsort(scores[by_key], descending=True, stable=True)]
