"""The clusterers compared by a study: functions from rows to labels and a rule for other rows.

Rows are (N, D), finite and not all identical; a clusterer that cannot cluster them raises
ClusteringError. K-means and the mixture are brainray's own. The others come from scikit-learn and
SciPy and are fitted to at most ``max_rows`` rows, drawn with ``seed``, as their cost is quadratic.
They do not assign other rows; these join the nearest centroid, core or fitted row, as documented in
each function.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from sklearn.cluster import DBSCAN, HDBSCAN, SpectralClustering
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from brainray.clustering.gmm import GaussianMixture, has_few_rows
from brainray.clustering.kmeans import KMeans
from brainray.clustering.seeding import draw_sample
from brainray.errors import ClusteringError
from brainray.schema import NOISE

Rows = NDArray[np.float64]  # (N, D)
Labels = NDArray[np.int64]  # (N,) clusters from 0, or NOISE

_KMEANS_STARTS = 10
_GRAPH_NEIGHBOURS = 10  # of each row, for spectral clustering

AssignmentRule = Callable[[Rows], Labels]
"""The rule of a fitted clusterer: assigns clusters to any rows."""


@dataclass(frozen=True)
class Clustered:
    """A fitted clustering."""

    labels: Labels  # of the fitted rows
    assign: AssignmentRule  # for other rows
    details: Mapping[str, float] = field(default_factory=dict)  # values found while fitting
    notes: tuple[str, ...] = ()  # caveats for the reader


def kmeans(x: Rows, num_clusters: int, *, seed: int, max_iter: int = 100) -> Clustered:
    """Lloyd's K-means; the best of several k-means++ starts."""
    fitted = KMeans(num_clusters, seed=seed, max_iter=max_iter, num_init=_KMEANS_STARTS)
    fitted.fit(torch.from_numpy(x))

    def assign(rows: Rows) -> Labels:
        return fitted.predict(torch.from_numpy(rows)).numpy()

    return Clustered(assign(x), assign, {"inertia": fitted.inertia_})


def gaussian_mixture(x: Rows, mixture: GaussianMixture) -> Clustered:
    """A mixture, which is fitted here; rows join their most responsible component."""
    mixture.fit(torch.from_numpy(x))

    def assign(rows: Rows) -> Labels:
        return mixture.predict(torch.from_numpy(rows)).numpy()

    few = has_few_rows(len(x), mixture.num_components, x.shape[1], mixture.covariance_type)
    notes = ("few rows per component for full covariances, so other rows fit them badly",)
    details = {"log_likelihood": mixture.lower_bound_}
    return Clustered(assign(x), assign, details, notes if few else ())


def agglomerative(
    x: Rows,
    num_clusters: int,
    *,
    seed: int,
    max_rows: int,
    linkage: str = "average",
    depth: int | None = None,
) -> Clustered:
    """Agglomerative clustering by cosine distance, cut at K clusters or at a depth below the root.

    Other rows join the centroid with the smallest cosine distance.
    """
    sample = draw_sample(len(x), max_rows, seed)
    tree = hierarchy_of(x[sample], linkage)
    if depth is None:
        labels = hierarchy.fcluster(tree, num_clusters, criterion="maxclust")
    else:
        labels = cut_at_depth(tree, depth)
    labels = _renumbered(labels)
    centroids = _centroids(normalize(x[sample]), labels)

    def assign(rows: Rows) -> Labels:
        return np.argmax(normalize(rows) @ normalize(centroids).T, axis=1)

    return _completed(x, sample, labels, assign)


def dbscan(
    x: Rows, min_samples: int, *, seed: int, max_rows: int, eps_factor: float = 1.0
) -> Clustered:
    """DBSCAN with eps at the knee of the k-distances.

    Other rows join the nearest core row within eps, otherwise they are noise.
    """
    sample = draw_sample(len(x), max_rows, seed)
    distances = k_distances(x[sample], min_samples)
    eps = eps_factor * distances[knee(distances)]
    if eps <= 0:
        raise ClusteringError(
            f"DBSCAN: cannot choose eps, as the k-distances bend at 0: too many rows coincide "
            f"with {min_samples} others; leave dbscan out or remove duplicates"
        )
    fitted = DBSCAN(eps=eps, min_samples=min_samples).fit(x[sample])
    labels = fitted.labels_.astype(np.int64)
    cores = fitted.core_sample_indices_
    nearest = NearestNeighbors(n_neighbors=1)
    if len(cores):
        nearest.fit(x[sample][cores])

    def assign(rows: Rows) -> Labels:
        if len(cores) == 0:
            return np.full(len(rows), NOISE, dtype=np.int64)
        distance, core = nearest.kneighbors(rows)
        return np.where(distance[:, 0] <= eps, labels[cores[core[:, 0]]], NOISE)

    return _completed(x, sample, labels, assign, {"eps": float(eps)})


def spectral(x: Rows, num_clusters: int, *, seed: int, max_rows: int) -> Clustered:
    """Normalised cuts of the nearest-neighbour graph; other rows join the nearest centroid."""
    sample = draw_sample(len(x), max_rows, seed)
    if len(sample) <= num_clusters:  # the solver needs fewer eigenvectors than rows
        raise ClusteringError(
            f"spectral: {num_clusters} clusters need more than {num_clusters} rows, "
            f"got {len(sample)}: leave spectral out or add images"
        )
    solver = SpectralClustering(
        n_clusters=num_clusters,
        affinity="nearest_neighbors",
        n_neighbors=min(_GRAPH_NEIGHBOURS, len(sample)),
        random_state=seed,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        labels = _renumbered(solver.fit(x[sample]).labels_)
    apart = any("not fully connected" in str(warning.message) for warning in caught)
    notes = ("the nearest-neighbour graph is not connected",) if apart else ()
    centroids = _centroids(x[sample], labels)
    assign = _label_of_nearest(centroids, np.arange(len(centroids)))
    return _completed(x, sample, labels, assign, notes=notes)


def hdbscan(x: Rows, min_samples: int, *, seed: int, max_rows: int) -> Clustered:
    """HDBSCAN: density at every scale; other rows join the nearest fitted row, even if noise."""
    sample = draw_sample(len(x), max_rows, seed)
    if len(sample) < min_samples:
        raise ClusteringError(
            f"HDBSCAN: min_samples ({min_samples}) exceeds the number of rows "
            f"({len(sample)}): lower study.min_samples or add images"
        )
    fitted = HDBSCAN(min_cluster_size=min_samples, copy=True).fit(x[sample])
    labels = fitted.labels_.astype(np.int64)
    return _completed(x, sample, labels, _label_of_nearest(x[sample], labels))


def _label_of_nearest(fitted: Rows, labels: Labels) -> AssignmentRule:
    """Rows join the cluster of the nearest fitted row."""
    neighbours = NearestNeighbors(n_neighbors=1).fit(fitted)

    def assign(rows: Rows) -> Labels:
        return np.asarray(labels[neighbours.kneighbors(rows)[1][:, 0]])

    return assign


def hierarchy_of(x: Rows, linkage: str) -> Rows:
    """SciPy's linkage matrix (N - 1, 4) by cosine distance.

    Raises:
        ClusteringError: a row is all zeros, which has no direction, or there are fewer than two.
    """
    if len(x) < 2:
        raise ClusteringError(
            f"agglomerative: at least 2 rows are needed, got {len(x)}: add images"
        )
    num_zero = int((~x.any(axis=1)).sum())
    if num_zero:
        raise ClusteringError(
            f"{num_zero} of {len(x)} rows are zero and have no cosine distance, as the features of "
            "these slices equal the mean: leave agglomerative out"
        )
    return np.asarray(hierarchy.linkage(x, method=linkage, metric="cosine"))


def cut_at_depth(tree: Rows, depth: int) -> Labels:
    """Clusters (N,): the subtrees rooted ``depth`` levels below the root, and leaves above that.

    The root is at level 0, so there are at most 2 ** depth clusters.
    """
    labels = np.empty(len(tree) + 1, dtype=np.int64)
    subtrees = [(hierarchy.to_tree(tree), 0)]
    num_clusters = 0
    while subtrees:
        node, level = subtrees.pop()
        if not node.is_leaf() and level < depth:
            subtrees += [(node.left, level + 1), (node.right, level + 1)]
            continue
        labels[node.pre_order()] = num_clusters
        num_clusters += 1
    return labels


def k_distances(x: Rows, k: int) -> NDArray[np.float64]:
    """Distances (N,) of the rows to their k-th nearest other row, ascending.

    Raises:
        ClusteringError: there are k rows or fewer.
    """
    if len(x) <= k:
        raise ClusteringError(
            f"{len(x)} rows have no {k}-th neighbours: lower study.min_samples or add images"
        )
    # Without an argument, a row is not its own neighbour.
    distances, _ = NearestNeighbors(n_neighbors=k).fit(x).kneighbors()
    return np.sort(distances[:, -1])


def knee(ascending: NDArray[np.float64]) -> int:
    """Index of the knee of a rising convex curve: its point farthest below the chord of its ends.

    Satopää et al. 2011, "Finding a kneedle in a haystack", without smoothing.
    """
    height = ascending[-1] - ascending[0]
    if height <= 0:
        return len(ascending) // 2
    along = np.linspace(0.0, 1.0, len(ascending))
    return int(np.argmax(along - (ascending - ascending[0]) / height))


def _completed(
    x: Rows,
    sample: NDArray[np.int64],
    sample_labels: Labels,
    assign: AssignmentRule,
    details: Mapping[str, float] | None = None,
    notes: tuple[str, ...] = (),
) -> Clustered:
    """Labels of all rows: the sample's own labels, and assigned ones for the others."""
    if len(sample) == len(x):
        return Clustered(sample_labels, assign, details or {}, notes)
    labels = assign(x)
    labels[sample] = sample_labels
    note = f"fitted to a random sample of {len(sample):,} of {len(x):,} rows; others were assigned"
    return Clustered(labels, assign, details or {}, (note, *notes))


def _renumbered(labels: NDArray[np.integer]) -> Labels:
    """Consecutive from 0, in ascending order of the old numbers."""
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _centroids(x: Rows, labels: Labels) -> Rows:
    return np.stack([x[labels == number].mean(axis=0) for number in range(labels.max() + 1)])
