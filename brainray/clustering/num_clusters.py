"""Number of clusters: silhouette, Bayesian information criterion and gap statistic for a range."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from brainray import dist
from brainray.clustering import shards
from brainray.clustering.gaussian import CovarianceType
from brainray.clustering.gmm import GaussianMixture
from brainray.clustering.kmeans import KMeans
from brainray.clustering.metrics import MAX_SILHOUETTE_ROWS, euclidean_silhouette
from brainray.clustering.seeding import draw_rows, uniform_from_keys
from brainray.errors import ClusteringError

_NUM_STARTS = 5


@dataclass(frozen=True)
class NumClustersScores:
    """Scores for each number of clusters, and the choice of each criterion."""

    num_clusters: list[int]
    silhouettes: list[float]  # nan if undefined
    bic: list[float]
    gap: list[float]
    gap_error: list[float]  # standard error of the gap, Tibshirani's s_k
    bic_of_one: float  # of a single component
    gap_of_one: float

    @property
    def prefer_one(self) -> list[str]:
        """The criteria, bic and gap, by which a single cluster describes the rows no worse than any
        of the numbers of clusters. The silhouette of one cluster is undefined.
        """
        no_worse = {
            "bic": self.bic_of_one <= min(self.bic),
            "gap": self.gap_of_one >= max(np.subtract(self.gap, self.gap_error)),
        }
        return [name for name, is_no_worse in no_worse.items() if is_no_worse]

    @property
    def chosen(self) -> dict[str, int]:
        """The K chosen by each criterion.

        These are the K with the largest silhouette, the K with the lowest BIC, and the first K
        whose gap is not exceeded by the next one by more than its error (Tibshirani et al. 2001,
        equation 6). A criterion that chooses none is left out: a gap that rises to the end of the
        range, or silhouettes that are undefined for every K.
        """
        best_gap = next(
            (
                k
                for k, here, following, error in zip(
                    self.num_clusters,
                    self.gap,
                    self.gap[1:],
                    self.gap_error[1:],
                    strict=False,
                )
                if here >= following - error
            ),
            None,
        )
        chosen = {}
        if not np.isnan(self.silhouettes).all():
            chosen["silhouette"] = self.num_clusters[int(np.nanargmax(self.silhouettes))]
        chosen["bic"] = self.num_clusters[int(np.argmin(self.bic))]
        return chosen if best_gap is None else chosen | {"gap": best_gap}


@torch.no_grad()
def score_num_clusters(
    x: Tensor,  # (n_rank, D) float32 or float64
    num_clusters: Sequence[int],
    *,
    row_keys: Tensor | None = None,
    covariance_type: CovarianceType = "full",
    num_references: int = 10,
    max_silhouette_rows: int = MAX_SILHOUETTE_ROWS,
    seed: int = 0,
) -> NumClustersScores:
    """Fit K-means and a mixture for each K, and for one cluster, and score them (collective).

    The gap compares log inertia with that of `num_references` uniform samples from the bounding box
    of the rows along their principal axes (Tibshirani et al. 2001, reference (b)).

    Args:
        x: this rank's rows.
        num_clusters: increasing, each at least 2.
        row_keys: unique over all ranks; by default the row's index in rank order.
        covariance_type: of the mixture used for the BIC.
        num_references: number of uniform samples for the gap.
        max_silhouette_rows: sample size for the silhouette, whose cost is quadratic.
        seed: of starts, samples and references.

    Raises:
        ClusteringError: on all ranks: an empty range, a K below 2, or rows that cannot be
            clustered.
    """
    ks = list(num_clusters)
    if not ks or min(ks) < 2 or ks != sorted(set(ks)):
        raise ClusteringError(f"numbers of clusters must increase from at least 2, got {ks}")
    num_rows = shards.check_rows(x)
    row_keys = shards.resolve_row_keys(x, row_keys)
    references = [
        _uniform_reference(x, num_rows, row_keys, seed, number) for number in range(num_references)
    ]
    everyone = torch.ones(len(x), dtype=torch.float64, device=x.device)
    sample = draw_rows(
        x, everyone, row_keys, seed=seed, step=0, count=min(max_silhouette_rows, num_rows)
    )
    silhouettes, bic, gap, gap_error = [], [], [], []
    for k in [1, *ks]:
        kmeans = KMeans(k, seed=seed, num_init=_NUM_STARTS).fit(x, row_keys=row_keys)
        found = euclidean_silhouette(
            sample.double().cpu().numpy(), kmeans.predict(sample).cpu().numpy()
        )
        silhouettes.append(math.nan if found is None else found)
        mixture = GaussianMixture(k, covariance_type, seed=seed)
        hard = torch.nn.functional.one_hot(kmeans.predict(x), k).to(x.dtype)
        bic.append(mixture.fit(x, init_responsibilities=hard, row_keys=row_keys).bic(x))
        expected = np.array(
            [
                # Separate seeds, as the reference rows are made from the random numbers of `seed`.
                _log_inertia(
                    KMeans(k, seed=seed + 1 + number, num_init=_NUM_STARTS).fit(
                        reference, row_keys=row_keys
                    )
                )
                for number, reference in enumerate(references)
            ]
        )
        gap.append(float(expected.mean()) - _log_inertia(kmeans))
        gap_error.append(float(expected.std()) * math.sqrt(1 + 1 / num_references))
    return NumClustersScores(
        ks, silhouettes[1:], bic[1:], gap[1:], gap_error[1:], bic_of_one=bic[0], gap_of_one=gap[0]
    )


def _log_inertia(kmeans: KMeans) -> float:
    return math.log(max(kmeans.inertia_, 1e-300))


def _uniform_reference(
    x: Tensor, num_rows: int, row_keys: Tensor, seed: int, number: int
) -> Tensor:
    """Uniform rows (n_rank, D) in the box around all ranks' rows along their principal axes."""
    mean = shards.mean_of_rows(x, num_rows)
    scatter = shards.scatter_of_rows(x, mean)
    axes = dist.broadcast_from_first(torch.linalg.eigh(scatter).eigenvectors)
    rotated = (x.double() - mean) @ axes
    extremes = dist.gather_rows(
        torch.stack([rotated.amin(dim=0), -rotated.amax(dim=0)])[None]
        if len(rotated)
        else rotated.new_full((1, 2, x.shape[1]), torch.inf)
    ).amin(dim=0)
    low, high = extremes[0], -extremes[1]
    num_features = x.shape[1]
    uniform = torch.stack(
        [
            uniform_from_keys(seed, 1 + number * num_features + feature, row_keys)
            for feature in range(num_features)
        ],
        dim=1,
    )
    return ((low + uniform * (high - low)) @ axes.T + mean).to(x.dtype)
