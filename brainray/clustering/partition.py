"""Scores of a partition in which rows may be noise and may have labels."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics.cluster import contingency_matrix
from sklearn.neighbors import NearestNeighbors

from brainray.clustering.metrics import clustering_metrics, silhouette
from brainray.schema import NOISE, UNLABELLED

NUM_NEIGHBOURS = 10
"""Number of labelled rows whose labels are compared with that of a row."""


def score_partition(
    x: NDArray[np.floating],  # (N, D), the clustered rows
    clusters: NDArray[np.integer],  # (N,) or NOISE
    labels: NDArray[np.integer],  # (N,) or UNLABELLED
    seed: int = 0,
) -> dict[str, float]:
    """Metrics of a partition; undefined metrics are left out.

    Noise is not a cluster: it is counted, but excluded from silhouette, ARI, NMI and FMI; in the
    accuracy, noise rows count as wrong. A partition that labels most rows as noise may thus score
    high on the rest: compare with ``noise_share``.

    Returns:
        num_rows, num_clusters, num_noise, noise_share: of all rows.
        silhouette: mean over clustered rows (at most 5,000, drawn with ``seed``), by Euclidean
            distance in ``x``; absent with fewer than two clusters or only singletons.
        nmi, ari, fmi: of clustered rows with a label; absent if these have fewer than two classes.
        accuracy: `clustering_accuracy` of rows with a label; absent if these have fewer than two
            classes.
    """
    clustered = clusters != NOISE
    num_noise = int((~clustered).sum())
    scores = {
        "num_rows": float(len(clusters)),
        "num_clusters": float(len(np.unique(clusters[clustered]))),
        "num_noise": float(num_noise),
        "noise_share": num_noise / max(1, len(clusters)),
    }
    separation = silhouette(x[clustered], clusters[clustered], seed)
    if separation is not None:
        scores["silhouette"] = separation
    labelled = labels != UNLABELLED
    both = labelled & clustered
    if len(np.unique(labels[both])) > 1:  # agreement needs two classes
        scores |= clustering_metrics(labels[both], clusters[both])
    if len(np.unique(labels[labelled])) > 1:
        scores["accuracy"] = clustering_accuracy(labels[labelled], clusters[labelled])
    return scores


def neighbour_agreement(
    fitted: NDArray[np.floating],  # (M, D)
    fitted_labels: NDArray[np.integer],  # (M,) or UNLABELLED
    x: NDArray[np.floating],  # (N, D), other rows
    labels: NDArray[np.integer],  # (N,) or UNLABELLED
) -> float | None:
    """Mean share of a row's nearest labelled fitted rows that have its label, in [0, 1].

    It measures how well the features reflect the labels, independent of any clustering: a partition
    into few clusters may follow another property that varies more. None if no row, or fewer fitted
    rows than `NUM_NEIGHBOURS`, have a label, or if all of these have the same.
    """
    is_fitted, is_query = fitted_labels != UNLABELLED, labels != UNLABELLED
    num_classes = len(np.unique(fitted_labels[is_fitted]))
    if not is_query.any() or is_fitted.sum() < NUM_NEIGHBOURS or num_classes < 2:
        return None
    index = NearestNeighbors(n_neighbors=NUM_NEIGHBOURS).fit(fitted[is_fitted])
    nearest = index.kneighbors(x[is_query], return_distance=False)
    return float(np.mean(fitted_labels[is_fitted][nearest] == labels[is_query, None]))


def clustering_accuracy(
    labels: NDArray[np.integer],  # (N,)
    clusters: NDArray[np.integer],  # (N,) or NOISE, which counts as wrong
) -> float:
    """Share of correct rows under the best one-to-one mapping of clusters to classes.

    The Hungarian assignment is fitted to the scored labels themselves (Yang et al. 2010): a metric
    for comparing partitions, not the accuracy of a prediction.
    """
    clustered = clusters != NOISE
    if not clustered.any():
        return 0.0
    counts = contingency_matrix(labels[clustered], clusters[clustered])
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(labels))
