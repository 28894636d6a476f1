"""Metrics of clusters, of the gathered rows of all ranks."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics as sk_metrics

from brainray.clustering.seeding import draw_sample

MAX_SILHOUETTE_ROWS = 5000
"""If there are more rows, this many are sampled: the time of a silhouette is quadratic."""


def clustering_metrics(labels_true: ArrayLike, labels_pred: ArrayLike) -> dict[str, float]:
    """Agreement of two partitions (N,), independent of their numbering.

    Returns:
        nmi: mutual information divided by the mean of both entropies, in [0, 1].
        ari: adjusted Rand index, 0 by chance, at most 1.
        fmi: Fowlkes-Mallows index, in [0, 1].
    """
    return {
        "nmi": float(sk_metrics.normalized_mutual_info_score(labels_true, labels_pred)),
        "ari": float(sk_metrics.adjusted_rand_score(labels_true, labels_pred)),
        "fmi": float(sk_metrics.fowlkes_mallows_score(labels_true, labels_pred)),
    }


def silhouette(
    x: NDArray[np.floating],  # (N, D)
    clusters: NDArray[np.integer],  # (N,)
    seed: int = 0,
) -> float | None:
    """Mean silhouette (Rousseeuw 1987) by Euclidean distance in `x`, in [-1, 1].

    With more than 5,000 rows, a sample of 5,000 is drawn with `seed`. None if undefined: fewer than
    two clusters, or as many as rows.
    """
    rows = draw_sample(len(x), MAX_SILHOUETTE_ROWS, seed)
    x, clusters = x[rows], clusters[rows]
    if not 2 <= len(np.unique(clusters)) < len(clusters):
        return None
    return float(sk_metrics.silhouette_score(x, clusters))
