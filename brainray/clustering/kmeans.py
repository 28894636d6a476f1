"""K-means on rows that are spread over ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

from brainray import dist
from brainray.clustering import shards
from brainray.clustering.fitted import FittedModule
from brainray.clustering.seeding import kmeans_plus_plus, too_few_distinct_rows
from brainray.errors import ClusteringError

_SETTLING_SHARE = 0.01
"""Bounds pay from when fewer rows than this move in an iteration, ..."""
_MIN_BOUNDED_CLUSTERS = 8
"""... and where there are more centres to pass over than a bound costs."""
_PICKING_COST = 16
"""Picking a row out of a block takes as long as its distances to so many centres."""
_COPIED_SHARE = 8
"""An iteration's block has room for its distances and a share of this of its rows: most are read
where they lie, and only those that are picked are copied."""
_FAR_MEAN = 0.7
"""Rows are far from the origin where their mean's norm is more than this of their mean norm."""
_WIDENED_ELEMENTS = 2**18
_BOUNDS_ROUNDING = 1e-4
"""Relative margin of bounds: some hundred float32 additions round by less."""

_Places = slice | Tensor  # which rows of a shard


class KMeans(FittedModule):
    """Lloyd's algorithm with scikit-learn's stopping rules; every rank brings its own rows.

    The result does not depend on how rows are spread over ranks, up to rounding, provided that
    `row_keys` stay with their rows. Distances are computed in the rows' dtype, on rows that lie
    around the origin or are moved there (one copy of the shard); sums, counts and inertia in
    float64. Sums follow the rows that move, and once few move, rows that cannot are passed over
    (`_Bounds`).

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
        data, origin = _centred(x, row_keys, num_rows)
        x = data.x
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

    def _best_start(self, data: "_CentredRows") -> "_Solution":
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

    def _lloyd(self, data: "_CentredRows", centers: Tensor) -> "_Solution":
        """Iterate from `centers` (K, D) float64, relative to the rows' origin, until they rest."""
        max_shift = self.tol * data.spread / (data.num_rows * data.x.shape[1])
        assignment = _Assignment.none(data, self.num_clusters)
        num_reseeded = num_iter = 0
        at_rest = False
        while num_iter < self.max_iter and not at_rest:
            num_iter += 1
            self._reassign(data, centers, assignment)
            sums, counts, total_moved = assignment.totals()
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
        self._reassign(data, centers, assignment)
        sums, counts, _ = assignment.totals()
        inertia = data.energy - 2 * (sums * centers).sum() + counts @ centers.square().sum(dim=1)
        return _Solution(centers, max(float(inertia), 0.0), num_iter, num_reseeded)

    def _reassign(self, data: "_CentredRows", centers: Tensor, assignment: "_Assignment") -> None:
        """Move each row to its nearest centre."""
        centers = centers.to(data.x.dtype)
        squares = centers.square().sum(dim=1)
        num_features, num_rows = data.x.shape[1], len(data.x)
        at_hand = max(len(centers), num_features // _COPIED_SHARE)
        block_rows = self.block_rows or shards.rows_in_cache(at_hand)
        scores = data.x.new_empty(min(block_rows, num_rows), len(centers))
        assignment.begin(centers)
        for block in shards.blocks(num_rows, block_rows):
            rows = assignment.undecided(block)
            x = _take(data.x, rows)
            if len(x) == 0:
                continue
            distances = torch.addmm(squares, x, centers.T, alpha=-2, out=scores[: len(x)])
            assignment.move(rows, x, distances)

    def _farthest_rows(
        self, data: "_CentredRows", centers: Tensor, labels: Tensor, num_empty: int
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


class _CentredRows(NamedTuple):
    x: Tensor  # (n_rank, D), relative to an origin near the mean of all ranks' rows
    squares: Tensor  # (n_rank,) squared norms
    row_keys: Tensor  # (n_rank,) int64
    num_rows: int  # on all ranks
    energy: float  # sum of all ranks' squared norms
    spread: float  # sum of the squared distances of all ranks' rows to their mean


def _centred(x: Tensor, row_keys: Tensor, num_rows: int) -> tuple[_CentredRows, Tensor]:
    """The rows, and the origin (D,) that they are relative to now (collective).

    That is their mean, or the origin that they had: rows that lie around it lose hardly a digit in
    their distances, and are not copied. (By their norms, not by squares: one outlier would hide
    how far the others are.)
    """
    norms = torch.linalg.vector_norm(x, dim=1)
    norm_sum, energy = _sums_of_powers(norms)
    mean = shards.mean_of_rows(x, num_rows)
    mean_norm = float(torch.linalg.vector_norm(mean))
    origin = torch.zeros_like(mean, dtype=x.dtype)
    spread = max(energy - num_rows * mean_norm**2, 0.0)
    if num_rows * mean_norm > _FAR_MEAN * norm_sum:  # the same on every rank
        origin = mean.to(x.dtype)
        x = x - origin
        norms = torch.linalg.vector_norm(x, dim=1)
        _, energy = _sums_of_powers(norms)
        spread = energy
    return _CentredRows(x, norms.square(), row_keys, num_rows, energy, spread), origin


def _sums_of_powers(norms: Tensor) -> tuple[float, float]:
    """Sums of all ranks' norms (n_rank,) and of their squares (collective)."""
    norms = norms.double()
    first, second = dist.sum_across_ranks(torch.stack([norms.sum(), norms.square().sum()])).tolist()
    return first, second


def _take(values: Tensor, rows: _Places) -> Tensor:
    """A view of a slice's rows, or a copy of picked ones (faster than by indexing)."""
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)


@dataclass
class _Assignment:
    """The clusters of this rank's rows, and what they sum to."""

    squares: Tensor  # (n_rank,) squared norms of the rows
    labels: Tensor  # (n_rank,) int64, -1 before the first iteration
    sums: Tensor  # (K, D) float64, of the rows of each cluster
    counts: Tensor  # (K,) float64
    num_moved: Tensor  # (1,) float64, in this iteration
    bounds: "_Bounds | None" = None
    is_new: bool = field(default=True, init=False)

    @classmethod
    def none(cls, data: _CentredRows, num_clusters: int) -> Self:
        x = data.x
        return cls(
            squares=data.squares,
            labels=torch.full((len(x),), -1, device=x.device),
            sums=torch.zeros(num_clusters, x.shape[1], dtype=torch.float64, device=x.device),
            counts=torch.zeros(num_clusters, dtype=torch.float64, device=x.device),
            num_moved=torch.zeros(1, dtype=torch.float64, device=x.device),
        )

    def begin(self, centers: Tensor) -> None:
        """Before an iteration with these centres (K, D)."""
        if self.bounds is not None:
            self.bounds.follow(centers)
        elif len(centers) >= _MIN_BOUNDED_CLUSTERS and not self.is_new and self._is_settling():
            self.bounds = _Bounds.none(self.squares, centers)
        self.is_new = bool(len(self.labels)) and int(self.labels[0]) < 0
        self.num_moved.zero_()

    def _is_settling(self) -> bool:
        return float(self.num_moved) <= _SETTLING_SHARE * len(self.labels)

    def undecided(self, block: slice) -> _Places:
        """The rows of a block whose nearest centre may be another one now."""
        return block if self.bounds is None else self.bounds.undecided(block, self.labels[block])

    def move(self, rows: _Places, x: Tensor, distances: Tensor) -> None:
        """Rows x (B, D) go where their distance (B, K; squared, less the row's own square) is
        least.

        A row that is as near to its own centre as to any stays. Only rows that move are summed,
        and only their nearest centres are looked for: minima are found many times faster than
        their places.
        """
        if self.is_new:
            nearest = distances.argmin(dim=1)
            self.labels[rows] = nearest
            self._add(x, nearest, 1)
            self.num_moved += len(x)
            return
        labels = _take(self.labels, rows)
        least = distances.amin(dim=1)
        moved = torch.nonzero(distances.gather(1, labels[:, None]).squeeze(1) > least).squeeze(1)
        if len(moved):
            source, nearest = labels[moved], _take(distances, moved).argmin(dim=1)
            x = _take(x, moved)
            self._add(x, nearest, 1)
            self._add(x, source, -1)
            self.num_moved += len(moved)
            labels[moved] = nearest
            self.labels[rows] = labels
        if self.bounds is not None:
            self.bounds.tighten(rows, _take(self.squares, rows), labels, least, distances)

    def _add(self, rows: Tensor, clusters: Tensor, sign: int) -> None:
        # In float64, or centres on one and on two ranks would differ by rounding and part ways; in
        # small blocks, which the processor's cache holds.
        for block in shards.blocks(len(rows), max(_WIDENED_ELEMENTS // rows.shape[1], 1)):
            self.sums.index_add_(0, clusters[block], rows[block].double(), alpha=sign)
        self.counts += sign * torch.bincount(clusters, minlength=len(self.counts))

    def totals(self) -> tuple[Tensor, ...]:
        """Sums (K, D), counts (K,) and moves (1,) of all ranks, in a single collective."""
        local = torch.cat([self.sums.flatten(), self.counts, self.num_moved])
        packed = dist.sum_across_ranks(local)
        sums, counts, moved = torch.split(packed, [self.sums.numel(), self.counts.numel(), 1])
        return sums.view_as(self.sums), counts, moved


@dataclass
class _Bounds:
    """What distances to centres can be at most and at least, without computing them.

    Hamerly 2010, "Making k-means even faster": a centre that has moved by s is nearer or farther
    by s at most. A row whose own centre is certainly the nearest need not be looked at. (His bound
    by the distances between centres is left out: it seldom decides in many dimensions.)
    """

    upper: Tensor  # (n_rank,) of the distance to the row's own centre
    lower: Tensor  # (n_rank,) of the distance to any other
    slack: float  # what squared distances may be wrong by in the rows' dtype
    centers: Tensor  # (K, D) to which the bounds apply
    shifts: Tensor  # (K,) how far each centre has moved since
    other_shifts: Tensor  # (K,) and the farthest of the others

    @classmethod
    def none(cls, squares: Tensor, centers: Tensor) -> Self:
        largest = torch.cat([squares, centers.square().sum(dim=1)]).amax()
        unmoved = squares.new_zeros(len(centers))
        return cls(
            upper=torch.full_like(squares, torch.inf),
            lower=torch.zeros_like(squares),
            slack=4 * float(largest) * (centers.shape[1] + 4) * torch.finfo(squares.dtype).eps,
            centers=centers,
            shifts=unmoved,
            other_shifts=unmoved,
        )

    def follow(self, centers: Tensor) -> None:
        self.shifts = torch.linalg.vector_norm(centers - self.centers, dim=1)
        farthest = self.shifts.topk(2)
        self.other_shifts = farthest.values[:1].repeat(len(self.shifts))
        self.other_shifts[farthest.indices[0]] = farthest.values[-1]
        self.centers = centers

    def undecided(self, block: slice, labels: Tensor) -> _Places:
        """The rows of a block that another centre may be nearest to; all, where they are many."""
        upper, lower = self.upper[block], self.lower[block]
        upper += _take(self.shifts, labels)
        lower -= _take(self.other_shifts, labels)
        found = torch.nonzero(upper >= lower).squeeze(1)
        num_clusters = len(self.shifts)
        costly = len(found) * (_PICKING_COST + num_clusters) > len(labels) * num_clusters
        return block if costly else found + block.start

    def tighten(
        self, rows: _Places, squares: Tensor, labels: Tensor, least: Tensor, distances: Tensor
    ) -> None:
        """Bounds of rows anew, from distances as in `_Assignment.move` (which are overwritten)."""
        others = distances.scatter_(1, labels[:, None], torch.inf).amin(dim=1)
        upper = (least + squares + self.slack).clamp_(min=0).sqrt_()
        lower = (others + squares - self.slack).clamp_(min=0).sqrt_()
        self.upper[rows] = upper.mul_(1 + _BOUNDS_ROUNDING)
        self.lower[rows] = lower.mul_(1 - _BOUNDS_ROUNDING)


class _Solution(NamedTuple):
    centers: Tensor  # (K, D) float64
    inertia: float
    num_iter: int
    num_reseeded: int
