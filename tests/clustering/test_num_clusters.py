"""The number of clusters, where it is known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import make_blobs

from brainray.clustering.kmeans import KMeans
from brainray.clustering.num_clusters import (
    NumClustersScores,
    _uniform_references,
    score_num_clusters,
)
from brainray.errors import ClusteringError


def test_all_criteria_find_well_separated_clusters() -> None:
    rows, _ = make_blobs(400, n_features=4, centers=5, cluster_std=0.4, random_state=3)
    scores = score_num_clusters(rows, range(2, 9), num_references=5)
    assert scores.chosen == {"silhouette": 5, "bic": 5, "gap": 5}
    assert all(math.isfinite(value) for value in scores.silhouettes + scores.bic + scores.gap)
    assert all(error > 0 for error in scores.gap_error)
    assert scores.prefer_one == []


@pytest.mark.parametrize("seed", range(3))
def test_one_cluster_is_preferred_where_there_is_one(seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((300, 3))
    scores = score_num_clusters(rows, [2, 3, 4, 5], num_references=5)
    assert scores.prefer_one == ["bic", "gap"]


def test_the_silhouette_is_by_the_distances_that_the_clusters_are_made_by() -> None:
    centers = [[-9.0, 0.0], [-3.0, 0.0], [3.0, 0.0], [9.0, 0.0]]  # two in each direction
    rows, _ = make_blobs(200, centers=centers, cluster_std=0.3, random_state=0)
    scores = score_num_clusters(rows, range(2, 7), num_references=2)
    assert scores.chosen["silhouette"] == 4


@pytest.mark.parametrize("degrees", [0, 30])
def test_rows_without_clusters_have_no_gap_however_they_are_turned(degrees: int) -> None:
    # Longer than wide, so that the principal axes are those of the box.
    box = np.random.default_rng(0).random((300, 2)) * [4.0, 1.0]
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    scores = score_num_clusters(box @ turn + [50.0, -20.0], [2, 3, 4], num_references=10)
    assert max(abs(value) for value in [scores.gap_of_one, *scores.gap]) < 0.1


def test_references_fill_the_box_along_the_principal_axes() -> None:
    corners = torch.tensor([[3.0, 1], [3, -1], [-3, 1], [-3, -1]], dtype=torch.float64)
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    origin = torch.tensor([7.0, -2.0], dtype=torch.float64)
    rows = corners.repeat(500, 1) @ turn + origin
    references = torch.stack(list(_uniform_references(rows, 3, seed=1)))
    assert references.shape == (3, 2000, 2)
    for reference in references:
        along = (reference - origin) @ turn.T / torch.tensor([3.0, 1.0])
        for axis in along.T:
            assert stats.kstest(axis.numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    assert not torch.equal(references[0], references[1])


def test_the_gap_and_its_error_are_those_of_tibshirani() -> None:
    rows = np.random.default_rng(0).standard_normal((60, 3))
    scores = score_num_clusters(rows, [2], num_references=4, seed=1)

    def log_inertia(x: torch.Tensor) -> float:
        return math.log(KMeans(2, seed=1, num_init=5).fit(x).inertia_)

    expected = [log_inertia(x) for x in _uniform_references(torch.from_numpy(rows), 4, seed=1)]
    assert scores.gap == pytest.approx([np.mean(expected) - log_inertia(torch.from_numpy(rows))])
    # Four references are a sample themselves.
    assert scores.gap_error == pytest.approx([np.std(expected) * math.sqrt(1 + 1 / 4)])


def test_a_gap_is_only_as_certain_as_its_own_error() -> None:
    scores = NumClustersScores(
        [2, 3, 4], [math.nan] * 3, [3.0, 2.0, 1.0], [0.1, 0.3, 0.35], [0.9, 0.05, 0.1], 9.0, 0.26
    )
    # From 2 to 3 it rises by more than the error at 3, from 3 to 4 by less than that at 4.
    assert scores.chosen["gap"] == 3
    assert scores.prefer_one == ["gap"]  # 0.26 is below 0.35, but not below 0.35 - 0.1


def test_without_a_silhouette_the_other_criteria_choose() -> None:
    undefined = [math.nan, math.nan]
    scores = NumClustersScores([2, 3], undefined, [2.0, 1.0], [0.0, 1.0], [0.1, 0.1], 3.0, -1.0)
    assert scores.chosen == {"bic": 3}


def test_the_seed_decides_the_references() -> None:
    rows = np.random.default_rng(0).standard_normal((60, 3))
    first, again, other = (
        score_num_clusters(rows, [2], num_references=2, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.gap != other.gap


def test_fewer_rows_than_features_are_scored() -> None:
    rows = np.random.default_rng(0).standard_normal((8, 12))
    scores = score_num_clusters(rows, [2, 3], num_references=2)
    assert all(math.isfinite(value) for value in scores.silhouettes + scores.bic + scores.gap)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused(bad: float) -> None:
    rows = np.ones((10, 2))
    rows[3, 1] = bad
    with pytest.raises(ClusteringError, match="1 of 10 rows contain NaN"):
        score_num_clusters(rows, [2])


@pytest.mark.parametrize("num_rows", [0, 2])
def test_too_few_rows_are_refused(num_rows: int) -> None:
    with pytest.raises(ClusteringError, match="need at least as many rows"):
        score_num_clusters(np.eye(3)[:num_rows], [2, 3])


@pytest.mark.parametrize("ks", [[], [1, 2], [3, 2], [2, 2]])
def test_a_range_must_make_sense(ks: list[int]) -> None:
    with pytest.raises(ClusteringError, match="must increase from at least 2"):
        score_num_clusters(np.ones((10, 2)), ks)
