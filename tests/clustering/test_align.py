import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from brainray.clustering.align import cluster_to_class, match_components


def responsibilities(num_rows: int, num_components: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(3 * torch.randn(num_rows, num_components, generator=generator), dim=1)


def test_matching_undoes_a_permutation() -> None:
    previous = responsibilities(100, 6, seed=0)
    current = previous[:, torch.tensor([3, 1, 5, 0, 2, 4])]
    order = match_components(previous, current)
    assert order.dtype == torch.int64
    torch.testing.assert_close(current[:, order], previous)


def test_matching_has_the_largest_overlap_of_all_orders() -> None:
    previous, current = responsibilities(30, 5, seed=1), responsibilities(30, 5, seed=2)

    def overlap(order: Tensor) -> float:
        return float((previous * current[:, order]).sum())

    best = max(overlap(torch.tensor(order)) for order in itertools.permutations(range(5)))
    assert overlap(match_components(previous, current)) == pytest.approx(best)


def test_as_many_clusters_as_classes_are_mapped_one_to_one() -> None:
    # Both clusters have a majority of class 0; one-to-one, 5 + 1 rows agree against 4 + 0.
    clusters = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    mapping = cluster_to_class(one_hot(clusters), labels, 2, torch.eye(2), torch.eye(2))
    assert mapping.tolist() == [0, 1]


def test_more_clusters_than_classes_take_their_majority() -> None:
    clusters = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    labels = torch.tensor([1, 1, 0, 0, 0, 1, 0, 1])
    mapping = cluster_to_class(one_hot(clusters), labels, 2, torch.zeros(3, 2), torch.eye(2))
    assert mapping.tolist() == [1, 0, 1]


@pytest.mark.parametrize("num_clusters", [3, 4])
def test_cluster_without_labelled_rows_takes_the_nearest_labelled_class(num_clusters: int) -> None:
    clusters = torch.tensor([0, 0, 1, 1])
    labels = torch.tensor([0, 0, 1, 1])
    # Class 2 has no labelled row: its mean is not read, nor can it be anybody's nearest.
    class_means = torch.tensor([[0.0, 0.0], [10.0, 0.0], [float("nan"), 0.0]])
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [9.0, 1.0], [2.0, 5.0]])[:num_clusters]
    gamma = one_hot(clusters, num_clusters)
    mapping = cluster_to_class(gamma, labels, 3, centers, class_means)
    assert mapping.tolist() == [0, 1, 1, 0][:num_clusters]


def test_responsibilities_vote_with_their_weight_and_fill_a_cluster_by_their_largest() -> None:
    gamma = torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.4, 0.6, 0.0], [0.1, 0.5, 0.4]])
    labels = torch.tensor([0, 1, 1, 0])
    # Cluster 0: class 0 has 1.0, class 1 has 0.8. Cluster 1: 0.6 against 1.2. Cluster 2 is no
    # row's largest, though all its weight is of class 0: it goes by its centre.
    centers = torch.tensor([[0.0], [1.0], [1.1]])
    mapping = cluster_to_class(gamma, labels, 2, centers, torch.tensor([[0.0], [1.0]]))
    assert mapping.tolist() == [0, 1, 1]


@pytest.mark.parametrize("num_clusters", [2, 3])
def test_a_few_rows_that_are_sure_outvote_more_that_are_not(num_clusters: int) -> None:
    """Cluster 0 is the largest of two rows of class 0 and of one of class 1, which is surer."""
    gamma = torch.tensor([[0.51, 0.49], [0.51, 0.49], [0.99, 0.01], [0.45, 0.55]])
    gamma = torch.nn.functional.pad(gamma, (0, num_clusters - 2))
    labels = torch.tensor([0, 0, 1, 1])
    # Responsibility: 1.02 against 1.44. With as many clusters as classes, 0.98 + 1.44 against
    # 1.02 + 0.56; rows alone would tie.
    centers = torch.zeros(num_clusters, 1)
    mapping = cluster_to_class(gamma, labels, 2, centers, torch.tensor([[0.0], [1.0]]))
    assert mapping[0] == 1
    if num_clusters == 2:
        assert mapping.tolist() == [1, 0]
