"""The number of clusters, where it is known."""

import math

import pytest
import torch
from sklearn.datasets import make_blobs

from brainray.clustering.num_clusters import NumClustersScores, score_num_clusters
from brainray.errors import ClusteringError


def test_all_criteria_find_well_separated_clusters() -> None:
    rows, _ = make_blobs(400, n_features=4, centers=5, cluster_std=0.4, random_state=3)
    scores = score_num_clusters(torch.from_numpy(rows), range(2, 9), num_references=5)
    assert scores.chosen == {"silhouette": 5, "bic": 5, "gap": 5}
    assert all(math.isfinite(value) for value in scores.silhouettes + scores.bic + scores.gap)
    assert all(error > 0 for error in scores.gap_error)
    assert scores.prefer_one == []


@pytest.mark.parametrize("seed", range(3))
def test_one_cluster_is_preferred_where_there_is_one(seed: int) -> None:
    rows = torch.randn(300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scores = score_num_clusters(rows, [2, 3, 4, 5], num_references=5)
    assert scores.prefer_one == ["bic", "gap"]


def test_the_silhouette_is_by_the_distances_that_the_clusters_are_made_by() -> None:
    centers = [[-9.0, 0.0], [-3.0, 0.0], [3.0, 0.0], [9.0, 0.0]]  # two in each direction
    rows, _ = make_blobs(200, centers=centers, cluster_std=0.3, random_state=0)
    scores = score_num_clusters(torch.from_numpy(rows), range(2, 7), num_references=2)
    assert scores.chosen["silhouette"] == 4


def test_rows_without_clusters_have_no_gap() -> None:
    rows = torch.rand(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Longer than wide, so that the principal axes are those of the box.
    rows *= torch.tensor([4.0, 1.0])
    scores = score_num_clusters(rows, [2, 3, 4], num_references=10)
    assert max(abs(value) for value in scores.gap) < 0.1


def test_without_a_silhouette_the_other_criteria_choose() -> None:
    undefined = [math.nan, math.nan]
    scores = NumClustersScores([2, 3], undefined, [2.0, 1.0], [0.0, 1.0], [0.1, 0.1], 3.0, -1.0)
    assert scores.chosen == {"bic": 3}


@pytest.mark.parametrize("ks", [[], [1, 2], [3, 2], [2, 2]])
def test_a_range_must_make_sense(ks: list[int]) -> None:
    with pytest.raises(ClusteringError, match="must increase from at least 2"):
        score_num_clusters(torch.rand(10, 2), ks)
