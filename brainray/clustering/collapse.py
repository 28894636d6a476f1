"""Detect the trivial minimum of the cluster loss, where all embeddings collapse to one point."""

import math
from dataclasses import dataclass

import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from brainray import dist
from brainray.clustering import shards
from brainray.errors import ClusteringError


@dataclass(frozen=True)
class ClusteringHealth:
    """Health metrics of one epoch's clustering, over the rows of all ranks."""

    smallest_share: float
    """Share of the rows, by responsibility, in the smallest cluster."""
    largest_share: float
    """The same for the largest cluster."""
    entropy: float
    """Mean entropy of gamma divided by log K: 0 if assignments are hard, 1 if they are uniform."""
    effective_rank: float
    """Number of dimensions that the embeddings use (Roy & Vetterli 2007)."""
    spread: float
    """Mean squared distance of L2-normalised embeddings to their mean: 0 (collapsed) to 1."""
    nmi_previous: float
    """Normalised mutual information with the previous epoch's clusters."""


@torch.no_grad()
def measure_health(
    z: Tensor,  # (n_rank, E)
    responsibilities: Tensor,  # (n_rank, K)
    previous_responsibilities: Tensor,  # (n_rank, K') of the same rows
) -> ClusteringHealth:
    """Measure how far from collapse a clustering is (collective).

    Raises:
        ClusteringError: there are no rows, or `z` contains NaN or infinity.
    """
    num_rows = shards.check_rows(z)
    if num_rows == 0:
        raise ClusteringError("no embeddings to measure on any rank: pass at least one row")
    gamma = responsibilities.double()
    num_clusters = gamma.shape[1]
    entropy = -torch.special.xlogy(gamma, gamma).sum()
    totals = dist.sum_across_ranks(torch.cat([gamma.sum(dim=0), entropy[None]]))
    shares = totals[:-1] / num_rows
    max_entropy = num_rows * math.log(num_clusters)
    directions = torch.nn.functional.normalize(z.double(), dim=1)
    distances = (directions - shards.mean_of_rows(directions, num_rows)).square().sum()
    before, now = (
        dist.gather_rows(each.argmax(dim=1)).cpu().numpy()
        for each in (previous_responsibilities, responsibilities)
    )
    return ClusteringHealth(
        smallest_share=float(shares.min()),
        largest_share=float(shares.max()),
        entropy=float(totals[-1]) / max_entropy if num_clusters > 1 else 0.0,
        effective_rank=effective_rank(z),
        spread=float(dist.sum_across_ranks(distances)) / num_rows,
        nmi_previous=float(normalized_mutual_info_score(before, now)),
    )


def describe_collapse(health: ClusteringHealth, max_share: float, min_spread: float) -> str | None:
    """How the clusters or embeddings have collapsed; None if they have not.

    Args:
        health: of the current epoch.
        max_share: largest allowed share of the rows in one cluster.
        min_spread: smallest allowed mean squared distance of normalised embeddings to their mean.
    """
    # Negated, so that NaN also counts as collapse.
    if not health.largest_share <= max_share:
        return (
            f"the clustering has collapsed: one cluster contains {health.largest_share:.1%} of all "
            f"rows, more than the allowed {max_share:.1%} (effective rank of the embeddings "
            f"{health.effective_rank:.1f})"
        )
    if not health.spread >= min_spread:
        return (
            f"the embeddings have collapsed: their mean squared distance to their mean is "
            f"{health.spread:.2g}, less than the allowed {min_spread:.2g} (effective rank "
            f"{health.effective_rank:.1f})"
        )
    return None


def effective_rank(z: Tensor) -> float:
    """Exponential of the entropy of the covariance's normalised eigenvalues (collective).

    Roy & Vetterli 2007, equation 2, applied to the covariance of all ranks' rows z (n_rank, E).
    Between 1 and E; 0 if all rows coincide.
    """
    num_rows = shards.check_rows(z)
    if num_rows == 0:
        return 0.0
    mean = shards.mean_of_rows(z, num_rows)
    eigenvalues = torch.linalg.eigvalsh(shards.scatter_of_rows(z, mean)).clamp(min=0)
    total = eigenvalues.sum()
    if total <= shards.IDENTICAL_ROWS_RATIO * num_rows * mean.square().sum():
        return 0.0
    shares = eigenvalues / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
