"""Mini-batch K-means, for rows that do not fit into memory."""

from typing import Self

import torch
from torch import Tensor

from brainray import dist
from brainray.clustering import shards
from brainray.clustering.fitted import FittedModule
from brainray.clustering.seeding import kmeans_plus_plus
from brainray.errors import ClusteringError


class MiniBatchKMeans(FittedModule):
    """Each centre is the running mean of all rows ever assigned to it (Sculley 2010).

    A batch consists of the rows of all ranks in one call of `partial_fit`; their distribution over
    the ranks does not matter, up to rounding. A centre without any rows so far is moved to the row
    of the batch that is farthest from its own centre.

    Fitted attributes:
        cluster_centers_: (K, D) float64.
        counts_: (K,) float64, number of rows assigned to each centre so far.
        n_steps_: number of batches.
        num_reseeded_: how often a centre was moved to the farthest row.
    """

    cluster_centers_: Tensor
    counts_: Tensor
    n_steps_: int
    num_reseeded_: int
    _fitted_numbers = ("n_steps_", "num_reseeded_")

    def __init__(self, num_clusters: int, seed: int = 0) -> None:
        """
        Args:
            num_clusters: K.
            seed: with the row keys, determines the k-means++ draws from the first batch.
        """
        super().__init__()
        if num_clusters < 1:
            raise ClusteringError(f"num_clusters={num_clusters} must be at least 1")
        self.num_clusters = num_clusters
        self.seed = seed
        self._register_fitted("cluster_centers_", "counts_")
        self.n_steps_ = 0
        self.num_reseeded_ = 0

    @torch.no_grad()
    def partial_fit(
        self,
        x: Tensor,  # (n_rank, D) float32 or float64
        *,
        row_keys: Tensor | None = None,  # (n_rank,) int64
        init_centers: Tensor | None = None,  # (K, D)
    ) -> Self:
        """Learn from one batch (collective).

        Args:
            x: this rank's rows; may be empty.
            row_keys: unique over all ranks; by default the row's index in rank order.
            init_centers: the same on every rank; replaces k-means++ at the first batch.

        Raises:
            ClusteringError: on all ranks: rows with NaN or infinity, or a first batch with fewer
                distinct rows than clusters.
        """
        num_rows = shards.check_rows(x)
        if num_rows == 0:
            return self
        row_keys = shards.resolve_row_keys(x, row_keys)
        if self.n_steps_ == 0:
            self._begin(x, num_rows, row_keys, init_centers)
        centers = self.cluster_centers_
        nearest = self.predict(x)
        distances = (x.double() - centers[nearest]).square().sum(dim=1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, x.double())
        counts = torch.bincount(nearest, minlength=self.num_clusters).double()
        packed = dist.sum_across_ranks(torch.cat([sums.flatten(), counts]))
        sums, counts = packed[: sums.numel()].view_as(sums), packed[sums.numel() :]
        self.counts_ = self.counts_ + counts
        chosen = counts > 0
        step = ((sums - counts[:, None] * centers) / self.counts_.clamp(min=1)[:, None])[chosen]
        moved = centers.clone()
        moved[chosen] += step
        unused = torch.nonzero(self.counts_ == 0).squeeze(1)
        if len(unused):
            farthest = shards.top_rows(x, distances.float(), row_keys, len(unused)).rows.double()
            moved[unused[: len(farthest)]] = farthest
            self.num_reseeded_ += len(farthest)
        self.cluster_centers_ = moved
        self.n_steps_ += 1
        return self

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Index of the nearest centre, (n,) int64, for rows (n, D). Not collective."""
        self._check_is_fitted()
        return shards.nearest_centers(x, self.cluster_centers_)

    def _begin(
        self, x: Tensor, num_rows: int, row_keys: Tensor, init_centers: Tensor | None
    ) -> None:
        if init_centers is not None:
            self.cluster_centers_ = init_centers.to(device=x.device, dtype=torch.float64)
        elif num_rows < self.num_clusters:
            raise ClusteringError(
                f"{self.num_clusters} clusters need a first batch of at least as many rows, but "
                f"it has {num_rows}: increase the batch size"
            )
        else:
            origin = shards.mean_of_rows(x, num_rows).to(x.dtype)
            self.cluster_centers_ = origin + kmeans_plus_plus(
                x - origin, self.num_clusters, row_keys, seed=self.seed
            )
        self.counts_ = torch.zeros(self.num_clusters, dtype=torch.float64, device=x.device)
