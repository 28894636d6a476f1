"""Choose the number of clusters without labels: stability under resampling, and a vote."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from brainray.clustering.kmeans import KMeans
from brainray.clustering.num_clusters import NumClustersScores
from brainray.errors import ClusteringError

_SAMPLE_SHARE = 0.8
_TITLES = {"bic": "BIC", "gap": "the gap statistic"}


@dataclass(frozen=True)
class Stability:
    """Agreement of the clusterings of two random samples, by number of clusters."""

    num_clusters: list[int]
    mean: list[float]  # adjusted Rand index on the rows in both samples
    error: list[float]  # its standard error over pairs of samples

    @property
    def chosen(self) -> int:
        """The largest K within one standard error of the most stable one.

        The largest, as few clusters are stable whatever the data.
        """
        best = int(np.argmax(self.mean))
        floor = self.mean[best] - self.error[best]
        return max(k for k, mean in zip(self.num_clusters, self.mean, strict=True) if mean >= floor)


def measure_stability(
    x: NDArray[np.float64],  # (N, D)
    num_clusters: Sequence[int],
    *,
    num_pairs: int = 10,
    seed: int = 0,
) -> Stability:
    """K-means on pairs of random samples of 80 % of the rows, compared on their common rows.

    Ben-Hur, Elisseeff & Guyon 2002, "A stability based method for discovering structure in
    clustered data", with the adjusted Rand index, which does not favour few clusters.

    Raises:
        ClusteringError: a sample has fewer (distinct) rows than clusters.
    """
    result = Stability(list(num_clusters), [], [])
    size = math.ceil(_SAMPLE_SHARE * len(x))
    if size < max(num_clusters):
        raise ClusteringError(
            f"samples of {size} rows are too small for {max(num_clusters)} clusters: lower "
            "study.candidate_num_clusters or add images"
        )
    for k in num_clusters:
        indices = []
        for pair in range(num_pairs):
            generator = np.random.default_rng([seed, pair])
            members, labels = [], []
            for _ in range(2):
                rows = np.sort(generator.choice(len(x), size, replace=False))
                sample = torch.from_numpy(x[rows])
                kmeans = KMeans(k, seed=int(generator.integers(2**31)), num_init=3).fit(sample)
                members.append(rows)
                labels.append(kmeans.predict(sample).numpy())
            _, first, second = np.intersect1d(
                members[0], members[1], assume_unique=True, return_indices=True
            )
            indices.append(adjusted_rand_score(labels[0][first], labels[1][second]))
        result.mean.append(float(np.mean(indices)))
        result.error.append(float(np.std(indices, ddof=1) / math.sqrt(num_pairs)))
    return result


@dataclass(frozen=True)
class Recommendation:
    """A number of clusters, with reasons."""

    num_clusters: int | None  # None: no recommendation
    reasons: list[str]


def recommend(scores: NumClustersScores, stability: Stability) -> Recommendation:
    """The K chosen by most of silhouette, BIC, gap and stability; in a tie, the more stable K.

    Args:
        scores: silhouette, BIC and gap.
        stability: of the same numbers of clusters.
    """
    assert scores.num_clusters == stability.num_clusters
    choices = scores.chosen | {"stability": stability.chosen}
    votes = Counter(choices.values())
    ends = scores.num_clusters[0], scores.num_clusters[-1]
    mean_of = dict(zip(stability.num_clusters, stability.mean, strict=True))
    chosen = max(votes, key=lambda k: (votes[k], mean_of[k]))
    place = scores.num_clusters.index(chosen)
    explained = {
        "silhouette": "the silhouette is highest at",
        "bic": "BIC is lowest at",
        "gap": "the gap statistic stops rising at",
        "stability": "clusterings of random samples agree up to",
    }
    reasons = [
        f"{'for' if k == chosen else 'against'}: {explained[name]} K = {k}"
        for name, k in choices.items()
    ]
    if "silhouette" not in choices:
        reasons.append("undecided: no K has a defined silhouette")
    if "gap" not in choices:
        reasons.append(
            "undecided: the gap statistic rises to the end of the range"
            if ends[0] < ends[1]
            else "undecided: the gap statistic needs a second K to compare with"
        )
    silhouette = scores.silhouettes[place]
    fit_quality = (
        "" if math.isnan(silhouette) else f"silhouette {silhouette:.3f} of a K-means fit, "
    )
    reasons.append(
        f"at K = {chosen}: {fit_quality}stability (ARI between samples) {mean_of[chosen]:.3f} +- "
        f"{stability.error[place]:.3f}"
    )
    if votes[chosen] == 1:
        reasons.append("no two criteria agree: treat K as a guess, and inspect the contact sheets")
    else:
        reasons.append(f"{votes[chosen]} of {len(choices)} criteria agree")
    if scores.prefer_one:
        names = " and ".join(_TITLES[name] for name in scores.prefer_one)
        doubt = ": there may be no groups at all" if len(scores.prefer_one) == len(_TITLES) else ""
        reasons.append(
            f"by {names}, a single cluster describes the slices no worse than {ends[0]} to "
            f"{ends[1]}{doubt}"
        )
    if chosen == ends[1] or chosen == ends[0] > 2:  # a K below 2 is no clustering
        reasons.append(
            f"K = {chosen} is at the end of the range {ends[0]}..{ends[1]}: widen "
            "study.candidate_num_clusters to be sure"
        )
    return Recommendation(chosen, reasons)
