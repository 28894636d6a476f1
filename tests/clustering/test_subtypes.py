"""Sub-types by hand: which clusters share a class, and how alike they are in other runs."""

import numpy as np
import pytest

from brainray.clustering.subtypes import find_subtypes

CLUSTERS = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
CLASSES = ["a"] * 6 + ["b"] * 3


def test_only_classes_with_several_clusters_have_subtypes() -> None:
    (found,) = find_subtypes(CLUSTERS, CLASSES, [])
    assert found.name == "a"
    assert [(part.cluster, part.size) for part in found.subtypes] == [(0, 4), (1, 2)]
    assert found.ari is None
    assert found.subtypes[0].stability is None
    assert not found.subtypes[0].is_stable


def test_the_same_partition_under_other_numbers_is_wholly_stable() -> None:
    (found,) = find_subtypes(CLUSTERS, CLASSES, [np.array([5, 7, 0])[CLUSTERS]] * 2)
    assert found.ari == 1.0
    assert [part.stability for part in found.subtypes] == [1.0, 1.0]
    assert all(part.is_stable for part in found.subtypes)


def test_stability_is_the_mean_best_jaccard_index() -> None:
    moved = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])  # one slice of cluster 0 went to cluster 1
    (found,) = find_subtypes(CLUSTERS, CLASSES, [CLUSTERS, moved])
    assert found.subtypes[0].stability == pytest.approx((1 + 3 / 4) / 2)
    assert found.subtypes[1].stability == pytest.approx((1 + 2 / 3) / 2)
    assert found.subtypes[0].is_stable
    # By hand: 7 of 15 pairs are together in one partition, 6 in the other, 4 in both.
    expected = 7 * 6 / 15
    ari = (4 - expected) / ((7 + 6) / 2 - expected)
    assert found.ari == pytest.approx((1 + ari) / 2)


def test_the_largest_subtype_comes_first() -> None:
    (found,) = find_subtypes(np.array([0, 0, 3, 3, 3, 1]), ["a"] * 6, [])
    assert [(part.cluster, part.size) for part in found.subtypes] == [(3, 3), (0, 2), (1, 1)]
