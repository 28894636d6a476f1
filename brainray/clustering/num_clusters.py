"""Number of clusters: silhouette, Bayesian information criterion and gap statistic for a range."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainray.clustering.gmm import GaussianMixture
from brainray.clustering.kmeans import KMeans
from brainray.clustering.metrics import silhouette
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


def score_num_clusters(
    x: NDArray[np.float64],  # (N, D)
    num_clusters: Sequence[int],
    *,
    mixture: Callable[[int], GaussianMixture] = GaussianMixture,
    num_references: int = 10,
    seed: int = 0,
) -> NumClustersScores:
    """Fit K-means and a mixture for each K, and for one cluster, and score them.

    The gap compares log inertia with that of `num_references` uniform samples from the bounding box
    of the rows along their principal axes (Tibshirani et al. 2001, reference (b)).

    Args:
        x: the rows.
        num_clusters: increasing, each at least 2.
        mixture: makes the mixture of K components used for the BIC.
        num_references: number of uniform samples for the gap.
        seed: of starts, samples and references.

    Raises:
        ClusteringError: an empty range, a K below 2, or rows that cannot be clustered.
    """
    ks = list(num_clusters)
    if not ks or min(ks) < 2 or ks != sorted(set(ks)):
        raise ClusteringError(f"numbers of clusters must increase from at least 2, got {ks}")
    rows = torch.from_numpy(x)
    fits = [_fit_kmeans(rows, k, seed) for k in [1, *ks]]
    expected = np.array(
        [
            [_log_inertia(_fit_kmeans(reference, k, seed)) for k in [1, *ks]]
            for reference in _uniform_references(rows, num_references, seed)
        ]
    )
    gap = (expected.mean(axis=0) - [_log_inertia(kmeans) for kmeans in fits]).tolist()
    gap_error = (expected.std(axis=0) * math.sqrt(1 + 1 / num_references)).tolist()
    silhouettes, bic = [], []
    for k, kmeans in zip([1, *ks], fits, strict=True):
        clusters = kmeans.predict(rows)
        found = silhouette(x, clusters.numpy(), seed)
        silhouettes.append(math.nan if found is None else found)
        hard = torch.nn.functional.one_hot(clusters, k).to(rows.dtype)
        bic.append(mixture(k).fit(rows, init_responsibilities=hard).bic(rows))
    return NumClustersScores(
        ks, silhouettes[1:], bic[1:], gap[1:], gap_error[1:], bic_of_one=bic[0], gap_of_one=gap[0]
    )


def _fit_kmeans(x: Tensor, num_clusters: int, seed: int) -> KMeans:
    return KMeans(num_clusters, seed=seed, num_init=_NUM_STARTS).fit(x)


def _log_inertia(kmeans: KMeans) -> float:
    return math.log(max(kmeans.inertia_, 1e-300))


def _uniform_references(x: Tensor, num_references: int, seed: int) -> Iterator[Tensor]:
    """Samples of uniform rows (N, D) in the box around the rows (N, D) along their principal axes,
    one at a time.
    """
    mean = x.mean(dim=0)
    axes = torch.linalg.svd(x - mean, full_matrices=False).Vh  # (min(N, D), D)
    low, high = ((x - mean) @ axes.T).aminmax(dim=0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_references):
        uniform = torch.rand(len(x), len(axes), generator=generator, dtype=x.dtype)
        yield (low + uniform * (high - low)) @ axes + mean
