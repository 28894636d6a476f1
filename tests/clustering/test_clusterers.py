"""The study's clusterers against scikit-learn, by hand, and on what they cannot cluster."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.cluster import DBSCAN, HDBSCAN, AgglomerativeClustering
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.metrics import adjusted_rand_score

from brainray.clustering.clusterers import (
    Clustered,
    agglomerative,
    cut_at_depth,
    dbscan,
    gaussian_mixture,
    hdbscan,
    hierarchy_of,
    k_distances,
    kmeans,
    knee,
    spectral,
)
from brainray.clustering.gaussian import CovarianceType
from brainray.clustering.gmm import GaussianMixture
from brainray.clustering.kmeans import KMeans
from brainray.clustering.seeding import draw_sample
from brainray.errors import ClusteringError
from brainray.schema import NOISE
from tests.clustering.test_kmeans import overlapping_blobs

K = 3
MANY: dict[str, Any] = {"seed": 0, "max_rows": 1000}
ALL: dict[str, Callable[[NDArray[np.float64]], Clustered]] = {
    "kmeans": lambda x: kmeans(x, K, seed=0),
    "gmm": lambda x: gaussian_mixture(x, GaussianMixture(K, "diag", num_init=3)),
    "agglomerative": lambda x: agglomerative(x, K, **MANY),
    "dbscan": lambda x: dbscan(x, 5, **MANY, eps_factor=2.0),
    "spectral": lambda x: spectral(x, K, **MANY),
    "hdbscan": lambda x: hdbscan(x, 5, **MANY),
}
EACH = pytest.mark.parametrize("name", ALL)


def blobs(num_rows: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Three tight groups in different directions from the origin, in turn."""
    generator = np.random.default_rng(seed)
    truth = np.arange(num_rows) % K
    centers = 10 * np.eye(K, 4)
    return centers[truth] + 0.3 * generator.standard_normal((num_rows, 4)), truth


@EACH
def test_separate_groups_are_found_in_fitted_rows_and_in_others(name: str) -> None:
    x, truth = blobs(90, seed=1)
    others, others_truth = blobs(30, seed=2)
    found = ALL[name](x)
    clustered = found.labels != NOISE
    assert clustered.mean() > 0.8
    assert adjusted_rand_score(truth[clustered], found.labels[clustered]) == 1
    labels = found.assign(others)
    clustered = labels != NOISE
    assert clustered.mean() > 0.8
    assert adjusted_rand_score(others_truth[clustered], labels[clustered]) == 1
    # Numbers mean the same in both.
    clusters_by_class = {c: set(found.labels[truth == c]) - {NOISE} for c in range(K)}
    assert all(set(labels[others_truth == c]) - {NOISE} <= clusters_by_class[c] for c in range(K))


@EACH
def test_rows_that_are_all_the_same_are_refused_or_left_together(name: str) -> None:
    x = np.ones((40, 4))
    if name in {"hdbscan", "spectral"}:  # scikit-learn's answer, whatever its use
        assert len(ALL[name](x).labels) == 40
    elif name == "agglomerative":  # equal directions are at distance 0
        assert len(ALL[name](x).labels) == 40
        with pytest.raises(ClusteringError, match="rows are zero and have no cosine distance"):
            ALL[name](0 * x)
    else:
        with pytest.raises(ClusteringError):
            ALL[name](x)


def test_kmeans_is_the_best_of_ten_starts_that_have_converged() -> None:
    x = overlapping_blobs().numpy()
    found = kmeans(x, 12, seed=0).details["inertia"]
    best_of_ten = SklearnKMeans(12, n_init=10, random_state=0).fit(x).inertia_
    assert found <= 1.01 * best_of_ten
    assert found < KMeans(12, seed=0).fit(torch.from_numpy(x)).inertia_
    assert found < kmeans(x, 12, seed=0, max_iter=1).details["inertia"]


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_the_hierarchy_cut_at_k_is_scikit_learns(linkage: str) -> None:
    x = np.random.default_rng(0).standard_normal((60, 5))
    theirs = AgglomerativeClustering(n_clusters=4, metric="cosine", linkage=linkage).fit(x)
    ours = agglomerative(x, 4, **MANY, linkage=linkage)
    assert adjusted_rand_score(theirs.labels_, ours.labels) == 1


def test_other_rows_join_the_centroid_of_directions_whatever_their_lengths() -> None:
    def directions(*degrees: float) -> NDArray[np.float64]:
        angles = np.deg2rad(degrees)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    x = directions(0, 40, 90, 100)
    x[0] *= 100
    found = agglomerative(x, 2, **MANY)
    # 56 degrees are nearer to 20 than to 95, but not than to 0, the mean with the long row.
    assert found.assign(directions(56)).tolist() == [found.labels[0]]


def test_a_hierarchy_is_cut_by_levels_below_its_root() -> None:
    # Directions at 0, 1, 10 and 90 degrees merge one after another: ((((0 1) 10) 90).
    angles = np.deg2rad([0.0, 1.0, 10.0, 90.0])
    tree = hierarchy_of(np.stack([np.cos(angles), np.sin(angles)], axis=1), "average")
    partitions = {
        depth: [set(np.flatnonzero(labels == k)) for k in np.unique(labels)]
        for depth in (0, 1, 2, 3, 10)
        for labels in [cut_at_depth(tree, depth)]
    }
    assert partitions[0] == [{0, 1, 2, 3}]
    assert sorted(map(sorted, partitions[1])) == [[0, 1, 2], [3]]
    assert sorted(map(sorted, partitions[2])) == [[0, 1], [2], [3]]
    assert sorted(map(sorted, partitions[3])) == [[0], [1], [2], [3]]
    assert sorted(map(sorted, partitions[10])) == [[0], [1], [2], [3]]


def test_a_depth_takes_the_place_of_k() -> None:
    x, _ = blobs(60, seed=0)
    partitions = [agglomerative(x, 9, **MANY, depth=depth).labels for depth in (0, 1)]
    assert [len(np.unique(labels)) for labels in partitions] == [1, 2]


def test_k_distances_do_not_count_the_row_itself() -> None:
    x = np.array([[0.0], [1.0], [3.0], [7.0]])
    # Second nearest others: 0 -> 3, 1 -> 2, 3 -> 3, 7 -> 6.
    np.testing.assert_allclose(k_distances(x, 2), [2.0, 3.0, 3.0, 6.0])
    with pytest.raises(ClusteringError, match="no 4-th neighbours"):
        k_distances(x, 4)


def test_the_knee_is_where_a_flat_stretch_turns_steep() -> None:
    curve = np.concatenate([np.linspace(1.0, 1.5, 80), np.linspace(1.6, 9.0, 20)])
    assert knee(curve) == 79
    assert knee(np.ones(9)) == 4


def test_dbscan_is_scikit_learns_and_other_rows_join_the_nearest_core_within_reach() -> None:
    rng = np.random.default_rng(0)
    groups = [0.5 * rng.standard_normal((60, 2)) + place for place in (3, -3)]
    x = np.concatenate([rng.uniform(-6, 6, (40, 2)), *groups])
    found = dbscan(x, 12, **MANY)
    eps = found.details["eps"]
    theirs = DBSCAN(eps=eps, min_samples=12).fit(x)
    np.testing.assert_array_equal(found.labels, theirs.labels_)
    cores = theirs.core_sample_indices_
    others = rng.uniform(-6, 6, (300, 2))
    distances = cdist(others, x[cores])
    nearest = theirs.labels_[cores][distances.argmin(axis=1)]
    expected = np.where(distances.min(axis=1) <= eps, nearest, NOISE)
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(found.assign(others), expected)


def test_hdbscan_is_scikit_learns_with_the_smallest_cluster_that_is_set() -> None:
    centers = np.repeat([[0, 0], [6, 0], [0, 6]], [120, 22, 8], axis=0)
    x = np.random.default_rng(0).standard_normal((150, 2)) + centers
    expected, default = (HDBSCAN(size, copy=True).fit(x).labels_ for size in (15, 5))
    assert (expected != default).any()
    np.testing.assert_array_equal(hdbscan(x, 15, **MANY).labels, expected)


@pytest.mark.parametrize(
    ("num_rows", "covariance_type", "is_few"),
    [(59, "full", True), (60, "full", False), (40, "diag", False)],
)
def test_fewer_than_five_rows_per_covariance_direction_are_noted(
    num_rows: int, covariance_type: CovarianceType, is_few: bool
) -> None:
    x = np.random.default_rng(0).standard_normal((num_rows, 4))  # 5 x 3 components x 4 = 60
    found = gaussian_mixture(x, GaussianMixture(3, covariance_type, reg_covar=0.1))
    assert bool(found.notes) == is_few


def test_dbscan_calls_noise_what_is_far_from_all_cores() -> None:
    x, _ = blobs(90, seed=1)
    far = np.full((1, 4), 50.0)
    found = ALL["dbscan"](np.concatenate([x, far]))
    assert found.labels[-1] == NOISE
    assert found.details["eps"] > 0
    assert found.assign(-far).tolist() == [NOISE]


def test_the_factor_multiplies_the_distance_at_the_knee() -> None:
    x, _ = blobs(90, seed=1)
    at_knee, doubled = (dbscan(x, 5, **MANY, eps_factor=factor) for factor in (1.0, 2.0))
    assert doubled.details["eps"] == pytest.approx(2 * at_knee.details["eps"])


@pytest.mark.parametrize(
    ("clusterer", "settings"),
    [
        (agglomerative, {"num_clusters": K}),
        (spectral, {"num_clusters": K}),
        (dbscan, {"min_samples": 5, "eps_factor": 2.0}),
        (hdbscan, {"min_samples": 5}),
    ],
)
def test_above_the_limit_a_drawn_sample_is_clustered_and_says_so(
    clusterer: Callable[..., Clustered], settings: dict[str, Any]
) -> None:
    x, truth = blobs(300, seed=3)
    found = clusterer(x, **settings, seed=0, max_rows=60)
    clustered = found.labels != NOISE
    assert clustered.mean() > 0.8
    assert adjusted_rand_score(truth[clustered], found.labels[clustered]) == 1
    assert found.notes[0].startswith("fitted to a random sample of 60 of 300 rows")
    again = clusterer(x, **settings, seed=0, max_rows=60)
    np.testing.assert_array_equal(found.labels, again.labels)


def test_rows_of_the_sample_keep_the_labels_that_they_were_given() -> None:
    x = np.random.default_rng(0).standard_normal((300, 5))
    found = agglomerative(x, 4, seed=0, max_rows=60)
    sample = draw_sample(300, 60, 0)
    alone = agglomerative(x[sample], 4, seed=0, max_rows=60)
    np.testing.assert_array_equal(found.labels[sample], alone.labels)
    assert (alone.labels != alone.assign(x[sample])).any()  # nearer to another's centroid
    others = np.setdiff1d(np.arange(300), sample)
    np.testing.assert_array_equal(found.labels[others], alone.assign(x[others]))


@pytest.mark.parametrize("clusterer", [spectral, dbscan, hdbscan])
def test_a_sample_too_small_for_the_settings_is_refused(
    clusterer: Callable[..., Clustered],
) -> None:
    x, _ = blobs(300, seed=3)
    with pytest.raises(ClusteringError):
        clusterer(x, 20, seed=0, max_rows=10)


def test_spectral_needs_fewer_clusters_than_rows() -> None:
    x, _ = blobs(40, seed=0)
    with pytest.raises(ClusteringError, match="6 clusters need more than 6 rows"):
        spectral(x[:6], 6, **MANY)


def test_more_clusters_than_rows_are_refused() -> None:
    x, _ = blobs(2, seed=0)
    for name in ("kmeans", "gmm"):
        with pytest.raises(ClusteringError, match=r"lower clustering\.num_clusters or add images"):
            ALL[name](x)
