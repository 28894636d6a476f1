"""K-means on rows that are distributed over ranks."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from brainray import dist
from brainray.clustering import shards
from brainray.clustering.centred import CentredRows, centred
from brainray.clustering.fitted import FittedModule
from brainray.clustering.lloyd import assignment
from brainray.clustering.seeding import kmeans_plus_plus, too_few_distinct_rows
from brainray.errors import ClusteringError


class KMeans(FittedModule):
    """Lloyd's algorithm with scikit-learn's stopping criteria; every rank provides its own rows.

    The result does not depend on how rows are distributed over ranks, up to rounding, provided that
    `row_keys` stay with their rows. Distances are computed in the rows' dtype, on rows that lie
    around the origin or are shifted there (one copy of the shard); sums, counts and inertia are
    float64. On CPUs, sums are updated incrementally for rows that change cluster, and rows that
    cannot change are skipped (`lloyd_cpu`).

    Fitted attributes:
        cluster_centers_: (K, D), in the rows' dtype.
        inertia_: sum of squared distances to the nearest centre, over all ranks.
        n_iter_: iterations of the best start.
        num_reseeded_: how often, in the best start, an empty cluster was moved to the row farthest
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
    ) -> None:
        """
        Args:
            num_clusters: K.
            max_iter: maximum number of Lloyd iterations per start.
            tol: stop when the summed squared shift of the centres is at most `tol` times the mean
                variance of a feature.
            seed: with the row keys, determines the k-means++ draws.
            num_init: number of k-means++ starts; the one with the lowest inertia is kept. (For
                float32 rows the inertia is only as accurate as their rounding: for tight clusters
                far apart, no digit may be correct.)
        """
        super().__init__()
        if min(num_clusters, max_iter, num_init) < 1:
            raise ClusteringError(
                f"num_clusters={num_clusters}, max_iter={max_iter} and num_init={num_init} must "
                "all be at least 1"
            )
        self.num_clusters = num_clusters
        self.max_iter = max_iter
        self.tol = tol
        self.seed = seed
        self.num_init = num_init
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
            ClusteringError: on all ranks: rows with NaN or infinity, or too large to be squared;
                fewer rows or fewer distinct rows than clusters; centres of the wrong shape.
        """
        data, origin = centred(x, row_keys)
        if data.num_rows < self.num_clusters:
            raise ClusteringError(
                f"{self.num_clusters} clusters need at least as many rows, but all ranks together "
                f"have {data.num_rows}: lower clustering.num_clusters or add images"
            )
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
        return shards.nearest_centers(x, self.cluster_centers_)

    def _best_start(self, data: CentredRows) -> "_Solution":
        best: _Solution | None = None
        for start in range(self.num_init):
            centers = kmeans_plus_plus(
                data.x,
                self.num_clusters,
                data.row_keys,
                seed=self.seed,
                first_step=start * self.num_clusters,
            )
            solution = self._lloyd(data, centers)
            # The margin prevents rounding from deciding between two starts with the same result.
            margin = max(1e-9, 10 * torch.finfo(data.x.dtype).eps)
            if best is None or solution.inertia < best.inertia * (1 - margin):
                best = solution
        assert best is not None
        return best

    def _lloyd(self, data: CentredRows, centers: Tensor) -> "_Solution":
        """Iterate from `centers` (K, D) float64, relative to the rows' origin, to convergence."""
        max_shift = self.tol * data.spread / (data.num_rows * data.x.shape[1])
        num_reseeded = num_iter = 0
        at_rest = False
        with assignment(data.x, data.squares, self.num_clusters) as assigned:
            while num_iter < self.max_iter and not at_rest:
                num_iter += 1
                assigned.move_rows(centers.to(data.x.dtype))
                sums, counts, total_moved = assigned.totals()
                new_centers = sums / counts.clamp(min=1)[:, None]
                empty = torch.nonzero(counts == 0).squeeze(1)
                if empty.numel():
                    farthest = self._farthest_rows(data, centers, assigned.labels, empty.numel())
                    new_centers[empty] = farthest
                    num_reseeded += empty.numel()
                else:
                    shift = float((new_centers - centers).square().sum())
                    at_rest = float(total_moved) == 0 or shift <= max_shift
                centers = new_centers
            assigned.move_rows(centers.to(data.x.dtype))
            sums, counts, _ = assigned.totals()
        inertia = data.energy - 2 * (sums * centers).sum() + counts @ centers.square().sum(dim=1)
        return _Solution(centers, max(float(inertia), 0.0), num_iter, num_reseeded)

    def _farthest_rows(
        self, data: CentredRows, centers: Tensor, labels: Tensor, num_empty: int
    ) -> Tensor:
        """The rows farthest from their centres on any rank, one for each empty cluster."""
        distances = self._distances(data.x, centers, labels)
        inertia = dist.sum_across_ranks(distances.sum())
        if inertia <= shards.IDENTICAL_ROWS_RATIO * data.spread:
            raise too_few_distinct_rows(self.num_clusters - num_empty, self.num_clusters)
        # In float32, distances that differ only by rounding are ties, broken by the row keys.
        return shards.top_rows(data.x, distances.float(), data.row_keys, num_empty).rows.double()

    def _distances(self, x: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
        """Squared distance of each row to its own centre, (n_rank,) float64."""
        distances = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
        for block in shards.cached_blocks(x, x.shape[1] + self.num_clusters):
            difference = x[block].double() - centers[labels[block]]
            distances[block] = difference.square().sum(dim=1)
        return distances

    def _checked(self, init_centers: Tensor, x: Tensor) -> Tensor:
        expected = (self.num_clusters, x.shape[1])
        if tuple(init_centers.shape) != expected or not bool(torch.isfinite(init_centers).all()):
            raise ClusteringError(
                f"init_centers must be finite and of shape {expected}, but have shape "
                f"{tuple(init_centers.shape)}: were they fitted with a different number of "
                "clusters or features?"
            )
        return init_centers.to(device=x.device, dtype=torch.float64)


class _Solution(NamedTuple):
    centers: Tensor  # (K, D) float64
    inertia: float
    num_iter: int
    num_reseeded: int
