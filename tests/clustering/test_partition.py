"""Figures of a partition agree with scikit-learn's; noise is counted and is no cluster."""

import numpy as np
import pytest
from sklearn import metrics as sk

from brainray.clustering.partition import clustering_accuracy, neighbour_agreement, score_partition
from brainray.schema import NOISE, UNLABELLED

N = 60
GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((N, 3))
LABELS = GENERATOR.integers(0, 4, N)
LABELINGS = {
    "random": GENERATOR.integers(0, 5, N),
    "the truth": LABELS,
    "one cluster": np.zeros(N, dtype=np.int64),
    "all singletons": np.arange(N),
}


@pytest.mark.parametrize("name", LABELINGS)
def test_figures_agree_with_scikit_learns(name: str) -> None:
    clusters = LABELINGS[name]
    scores = score_partition(X, clusters, LABELS)
    assert scores["nmi"] == pytest.approx(sk.normalized_mutual_info_score(LABELS, clusters))
    assert scores["ari"] == pytest.approx(sk.adjusted_rand_score(LABELS, clusters))
    assert scores["fmi"] == pytest.approx(sk.fowlkes_mallows_score(LABELS, clusters))
    assert scores["num_clusters"] == len(np.unique(clusters))
    assert scores["num_noise"] == 0
    if name in {"one cluster", "all singletons"}:
        assert "silhouette" not in scores
    else:
        assert scores["silhouette"] == pytest.approx(sk.silhouette_score(X, clusters))


def test_noise_is_counted_and_scored_as_no_cluster() -> None:
    clusters = LABELINGS["random"].copy()
    clusters[::3] = NOISE
    kept = clusters != NOISE
    scores = score_partition(X, clusters, LABELS)
    assert scores["num_noise"] == 20
    assert scores["noise_share"] == pytest.approx(1 / 3)
    assert scores["num_clusters"] == len(np.unique(clusters[kept]))
    assert scores["nmi"] == pytest.approx(
        sk.normalized_mutual_info_score(LABELS[kept], clusters[kept])
    )
    assert scores["silhouette"] == pytest.approx(sk.silhouette_score(X[kept], clusters[kept]))
    assert scores["nmi"] != pytest.approx(sk.normalized_mutual_info_score(LABELS, clusters))
    right_of_kept = clustering_accuracy(LABELS[kept], clusters[kept])
    assert scores["accuracy"] == pytest.approx(right_of_kept * 40 / 60)  # noise is wrong


def test_noise_alone_has_counts_and_no_merit() -> None:
    scores = score_partition(X, np.full(N, NOISE), LABELS)
    assert scores["num_clusters"] == 0
    assert scores["noise_share"] == 1
    assert scores["accuracy"] == 0
    assert scores.keys().isdisjoint({"nmi", "ari", "fmi", "silhouette"})


def test_without_labels_figures_that_need_them_are_absent() -> None:
    scores = score_partition(X, LABELINGS["random"], np.full(N, UNLABELLED))
    assert "silhouette" in scores
    assert scores.keys().isdisjoint({"nmi", "ari", "fmi", "accuracy"})


def test_slices_without_a_label_are_left_out_of_what_needs_one() -> None:
    labels = LABELS.copy()
    labels[:20] = UNLABELLED
    clusters = LABELINGS["random"]
    scores = score_partition(X, clusters, labels)
    assert scores["ari"] == pytest.approx(sk.adjusted_rand_score(LABELS[20:], clusters[20:]))
    assert scores["num_rows"] == N


def test_the_accuracy_names_clusters_one_to_one_and_counts_noise_as_wrong() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    assert clustering_accuracy(labels, np.array([7, 7, 7, 5, 5, 5])) == 1
    # Three clusters for two classes: the smallest stands for none.
    assert clustering_accuracy(labels, np.array([7, 7, 3, 5, 5, 5])) == pytest.approx(5 / 6)
    assert clustering_accuracy(labels, np.array([7, 7, NOISE, 5, 5, 5])) == pytest.approx(5 / 6)


def test_neighbours_agree_by_hand_and_only_where_labels_are_known() -> None:
    fitted = np.array([0.5, *range(8), *range(20, 27)])[:, None]
    fitted_labels = np.array([UNLABELLED] + [0] * 7 + [1] * 8)
    queries, labels = np.array([[0.4], [26.4], [14.0]]), np.array([0, 1, UNLABELLED])
    # The ten nearest with a label: 0 to 7 and 20 and 21, of which 0 to 6 carry 0, as queried; 20 to
    # 26, which carry 1, as queried, and 5 to 7, of which only 7 does.
    agreement = neighbour_agreement(fitted, fitted_labels, queries, labels)
    assert agreement == pytest.approx((7 / 10 + 8 / 10) / 2)
    assert neighbour_agreement(fitted[6:], fitted_labels[6:], queries, labels) is not None
    assert neighbour_agreement(fitted[7:], fitted_labels[7:], queries, labels) is None  # only nine
    unknown = np.full(3, UNLABELLED)
    assert neighbour_agreement(fitted, fitted_labels, queries, unknown) is None
    alike = np.zeros(len(fitted), np.int64)
    assert neighbour_agreement(fitted, alike, queries, labels) is None
