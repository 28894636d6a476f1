"""K-means on rows that are spread over ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from brainray import dist
from brainray.clustering import shards
from brainray.clustering.fitted import FittedModule
from brainray.clustering.seeding import kmeans_plus_plus, too_few_distinct_rows
from brainray.errors import ClusteringError


class KMeans(FittedModule):
    """Lloyd's algorithm with scikit-learn's stopping rules; every rank brings its own rows.

    The result does not depend on how rows are spread over ranks, up to rounding, provided that
    `row_keys` stay with their rows. Distances are computed in the rows' dtype, on rows centred at
    their mean (one copy of the shard); sums, counts and inertia in float64. Sums follow the rows
    that move, so that an iteration at rest costs no more than distances.

    Fitted attributes:
        cluster_centers_: (K, D), in the rows' dtype.
        inertia_: sum of squared distances to the nearest centre, over all ranks.
        n_iter_: iterations of the best start.
        num_reseeded_: how often, in that start, an empty cluster was moved to the row farthest
            from its centre.
    """

    cluster_centers_: Tensor
    inertia_: float
    n_iter_: int
    num_reseeded_: int
    _fitted_numbers = ("inertia_", "n_iter_", "num_reseeded_")

    def __init__(
        self,
        num_clusters: int,
        max_iter: int = 100,
        tol: float = 1e-4,
        seed: int = 0,
        num_init: int = 1,
        block_rows: int | None = None,
    ) -> None:
        """
        Args:
            num_clusters: K.
            max_iter: limit of Lloyd iterations for each start.
            tol: stop when the centres' summed squared shift is at most `tol` times the mean
                variance of a feature.
            seed: with the row keys, determines the k-means++ draws.
            num_init: k-means++ starts, of which the one with the least inertia is kept.
            block_rows: rows per matrix product, which bounds the memory to block_rows x (D + K); by
                default as many as a processor's cache holds.
        """
        super().__init__()
        if min(num_clusters, max_iter, num_init, block_rows or 1) < 1:
            raise ClusteringError(
                f"num_clusters={num_clusters}, max_iter={max_iter}, num_init={num_init} and "
                f"block_rows={block_rows} must all be at least 1"
            )
        self.num_clusters = num_clusters
        self.max_iter = max_iter
        self.tol = tol
        self.seed = seed
        self.num_init = num_init
        self.block_rows = block_rows
        self._register_fitted("cluster_centers_")
        self.inertia_ = float("nan")
        self.n_iter_ = 0
        self.num_reseeded_ = 0

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,  # (n_rank, D) float32 or float64
        *,
        row_keys: Tensor | None = None,  # (n_rank,) int64
        init_centers: Tensor | None = None,  # (K, D)
    ) -> Self:
        """Find centres for the rows of all ranks (collective).

        Args:
            x: this rank's rows; may be empty.
            row_keys: unique over all ranks; by default the global row index in rank order.
            init_centers: the same on every rank; replaces k-means++ (and its `num_init` starts).

        Raises:
            ClusteringError: on every rank alike: rows with NaN or infinity, fewer rows or fewer
                distinct rows than clusters, centres that do not fit.
        """
        num_rows = shards.check_rows(x)
        if num_rows < self.num_clusters:
            raise ClusteringError(
                f"{self.num_clusters} clusters need at least as many rows, but all ranks together "
                f"hold {num_rows}: lower clustering.num_clusters or add images"
            )
        row_keys = shards.resolve_row_keys(x, row_keys)
        origin = shards.mean_of_rows(x, num_rows).to(x.dtype)
        x = x - origin
        norms = torch.linalg.vector_norm(x, dim=1)
        spread = dist.sum_across_ranks(norms.double().square().sum())
        data = _CenteredRows(x, row_keys, num_rows, spread)
        if init_centers is not None:
            best = self._lloyd(data, self._checked(init_centers, x) - origin)
        else:
            best = self._best_start(data)
        self.cluster_centers_ = (best.centers + origin).to(x.dtype)
        self.inertia_ = best.inertia
        self.n_iter_ = best.num_iter
        self.num_reseeded_ = best.num_reseeded
        return self

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Index of the nearest centre, (n,) int64, for rows (n, D). Not collective."""
        self._check_is_fitted()
        # Shifted to the centres' mean: far from the origin, squared distances lose their digits.
        origin = self.cluster_centers_.mean(dim=0)
        centers = (self.cluster_centers_ - origin).to(x.dtype)
        squares = centers.square().sum(dim=1)
        labels = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
        for block in self._blocks(x):
            rows = x[block] - origin.to(x.dtype)
            labels[block] = torch.addmm(squares, rows, centers.T, alpha=-2).argmin(dim=1)
        return labels

    def _best_start(self, data: "_CenteredRows") -> "_Solution":
        best: _Solution | None = None
        for start in range(self.num_init):
            centers = kmeans_plus_plus(
                data.x,
                self.num_clusters,
                data.row_keys,
                seed=self.seed,
                first_step=start * self.num_clusters,
                block_rows=self._rows_of_block(data.x),
            )
            solution = self._lloyd(data, centers)
            # The margin keeps rounding from choosing between two starts with the same outcome.
            margin = max(1e-9, 10 * torch.finfo(data.x.dtype).eps)
            if best is None or solution.inertia < best.inertia * (1 - margin):
                best = solution
        assert best is not None
        return best

    def _lloyd(self, data: "_CenteredRows", centers: Tensor) -> "_Solution":
        """Iterate from `centers` (K, D) float64, relative to the rows' mean, until they rest."""
        max_shift = self.tol * float(data.spread) / (data.num_rows * data.x.shape[1])
        assignment = _Assignment.none(data.x, self.num_clusters)
        num_reseeded = num_iter = 0
        at_rest = False
        while num_iter < self.max_iter and not at_rest:
            num_iter += 1
            num_moved = self._reassign(data, centers, assignment)
            sums, counts, total_moved = assignment.totals(num_moved)
            new_centers = sums / counts.clamp(min=1)[:, None]
            empty = torch.nonzero(counts == 0).squeeze(1)
            if empty.numel():
                farthest = self._farthest_rows(data, centers, assignment.labels, empty.numel())
                new_centers[empty] = farthest
                num_reseeded += empty.numel()
            else:
                shift = float((new_centers - centers).square().sum())
                at_rest = float(total_moved) == 0 or shift <= max_shift
            centers = new_centers
        num_moved = self._reassign(data, centers, assignment)
        sums, counts, _ = assignment.totals(num_moved)
        inertia = data.spread - 2 * (sums * centers).sum() + counts @ centers.square().sum(dim=1)
        return _Solution(centers, max(float(inertia), 0.0), num_iter, num_reseeded)

    def _reassign(
        self, data: "_CenteredRows", centers: Tensor, assignment: "_Assignment"
    ) -> Tensor:
        """Move each row to its nearest centre; returns how many moved, (1,) float64."""
        centers = centers.to(data.x.dtype)
        squares = centers.square().sum(dim=1)
        num_moved = assignment.counts.new_zeros(1)
        scores = data.x.new_empty(min(self._rows_of_block(data.x), len(data.x)), len(centers))
        for block in self._blocks(data.x):
            rows = data.x[block]
            distances = torch.addmm(squares, rows, centers.T, alpha=-2, out=scores[: len(rows)])
            num_moved += assignment.move(block, rows, distances)
        return num_moved

    def _farthest_rows(
        self, data: "_CenteredRows", centers: Tensor, labels: Tensor, num_empty: int
    ) -> Tensor:
        """The rows farthest from their centres on any rank, one for each empty cluster."""
        distances = self._distances(data.x, centers, labels)
        inertia = dist.sum_across_ranks(distances.sum())
        if inertia <= shards.IDENTICAL_ROWS_RATIO * data.spread:
            raise too_few_distinct_rows(self.num_clusters - num_empty, self.num_clusters)
        # In float32: distances equal but for rounding are a tie, which the row keys settle.
        return shards.top_rows(data.x, distances.float(), data.row_keys, num_empty).rows.double()

    def _distances(self, x: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
        """Squared distance of each row to its own centre, (n_rank,) float64."""
        distances = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
        for block in self._blocks(x):
            difference = x[block].double() - centers[labels[block]]
            distances[block] = difference.square().sum(dim=1)
        return distances

    def _blocks(self, x: Tensor) -> Iterator[slice]:
        return shards.blocks(x.shape[0], self._rows_of_block(x))

    def _rows_of_block(self, x: Tensor) -> int:
        return self.block_rows or shards.rows_in_cache(x.shape[1] + self.num_clusters)

    def _checked(self, init_centers: Tensor, x: Tensor) -> Tensor:
        expected = (self.num_clusters, x.shape[1])
        if tuple(init_centers.shape) != expected or not bool(torch.isfinite(init_centers).all()):
            raise ClusteringError(
                f"init_centers must be finite and of shape {expected}, but have shape "
                f"{tuple(init_centers.shape)}: were they fitted with another number of clusters "
                "or features?"
            )
        return init_centers.to(device=x.device, dtype=torch.float64)


class _CenteredRows(NamedTuple):
    x: Tensor  # (n_rank, D), the mean of all ranks' rows taken away
    row_keys: Tensor  # (n_rank,) int64
    num_rows: int  # on all ranks
    spread: Tensor  # () float64, sum of the squared distances of all ranks' rows to their mean


@dataclass
class _Assignment:
    """The clusters of this rank's rows, and what they sum to."""

    labels: Tensor  # (n_rank,) int64, -1 before the first iteration
    sums: Tensor  # (K, D) float64, of the rows of each cluster
    counts: Tensor  # (K,) float64

    @classmethod
    def none(cls, x: Tensor, num_clusters: int) -> Self:
        return cls(
            labels=torch.full((len(x),), -1, device=x.device),
            sums=torch.zeros(num_clusters, x.shape[1], dtype=torch.float64, device=x.device),
            counts=torch.zeros(num_clusters, dtype=torch.float64, device=x.device),
        )

    def move(self, block: slice, rows: Tensor, distances: Tensor) -> int:
        """Rows (B, D) of a block go where their distance (B, K) is least; returns how many moved.

        A row that is as near to its own centre as to any stays. Only rows that move are summed,
        and only their nearest centres are looked for: minima are found many times faster than
        their places.
        """
        labels = self.labels[block]
        if len(labels) and labels[0] < 0:  # the first iteration
            nearest = distances.argmin(dim=1)
            self.labels[block] = nearest
            self._add(rows, nearest, 1)
            return len(rows)
        own = distances.gather(1, labels[:, None]).squeeze(1)
        moved = torch.nonzero(own > distances.amin(dim=1)).squeeze(1)
        if len(moved):
            rows, source = rows[moved], labels[moved]
            nearest = distances[moved].argmin(dim=1)
            labels[moved] = nearest  # a view of all labels
            self._add(rows, nearest, 1)
            self._add(rows, source, -1)
        return len(moved)

    def _add(self, rows: Tensor, clusters: Tensor, sign: int) -> None:
        self.sums.index_add_(0, clusters, rows.double(), alpha=sign)
        self.counts += sign * torch.bincount(clusters, minlength=len(self.counts))

    def totals(self, num_moved: Tensor) -> tuple[Tensor, ...]:
        """Sums (K, D), counts (K,) and moves (1,) of all ranks, in a single collective."""
        packed = dist.sum_across_ranks(torch.cat([self.sums.flatten(), self.counts, num_moved]))
        sums, counts, moved = torch.split(packed, [self.sums.numel(), self.counts.numel(), 1])
        return sums.view_as(self.sums), counts, moved


class _Solution(NamedTuple):
    centers: Tensor  # (K, D) float64
    inertia: float
    num_iter: int
    num_reseeded: int
