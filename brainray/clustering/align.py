"""Label alignment: match clusters across epochs, and map clusters to classes."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from brainray import dist


def match_components(
    previous: Tensor,  # (n_rank, K) responsibilities
    current: Tensor,  # (n_rank, K) responsibilities of the same rows
) -> Tensor:  # (K,) int64
    """Permutation that aligns the current components with the previous ones (collective).

    `current[:, order]` overlaps most with `previous`: the Hungarian assignment (Kuhn 1955)
    maximises sum_k sum_i previous_ik current_i,order(k) over the rows of all ranks.
    """
    overlap = dist.sum_across_ranks(previous.double().T @ current.double())
    _, order = linear_sum_assignment(overlap.cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(device=current.device, dtype=torch.int64)


def cluster_to_class(
    responsibilities: Tensor,  # (n_rank, K) of this rank's labelled rows
    labels: Tensor,  # (n_rank,) int64 in [0, C)
    num_classes: int,
    centers: Tensor,  # (K, E), the same on every rank
    class_means: Tensor,  # (C, E), the same on every rank
) -> Tensor:  # (K,) int64
    """Map each of K clusters to one of C <= K classes, using labelled rows only (collective).

    K == C: the one-to-one assignment with the most responsibility for labelled rows in agreement.
    K > C: each cluster takes its majority class. In both cases a cluster that is not the most
    responsible one of any labelled row takes the class of the nearest labelled class mean instead,
    whether that class is already taken or not.

    Args:
        responsibilities: of the labelled rows; one-hot for hard clusters.
        labels: their classes.
        num_classes: C.
        centers: of the clusters, in the space of `class_means`.
        class_means: means of the labelled rows; not read for classes without labelled rows.
    """
    num_clusters = centers.shape[0]
    votes, num_rows = _count_votes(responsibilities, labels, num_classes)
    if num_clusters == num_classes:
        _, classes = linear_sum_assignment(votes.cpu().numpy(), maximize=True)
        mapping = torch.from_numpy(classes).to(device=centers.device, dtype=torch.int64)
    else:
        mapping = votes.argmax(dim=1)
    distances = torch.cdist(centers.double(), class_means.double())  # (K, C)
    distances[:, num_rows.sum(dim=0) == 0] = torch.inf
    return torch.where(num_rows.sum(dim=1) == 0, distances.argmin(dim=1), mapping)


def _count_votes(
    responsibilities: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Responsibility and number of rows of all ranks by cluster and class, each (K, C) float64.

    A row counts for its most responsible cluster.
    """
    by_class = torch.nn.functional.one_hot(labels, num_classes).double()
    largest = responsibilities.argmax(dim=1)
    by_cluster = torch.nn.functional.one_hot(largest, responsibilities.shape[1]).double()
    votes = dist.sum_across_ranks(responsibilities.double().T @ by_class)
    return votes, dist.sum_across_ranks(by_cluster.T @ by_class)
