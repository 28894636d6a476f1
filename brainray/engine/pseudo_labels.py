"""Pseudo-labels: predictions for unlabelled slices that are targets of the next epoch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from brainray import dist
from brainray.schema import UNLABELLED

_NUM_BALANCING = 20
_WIDTH = 2.0  # standard deviations, SoftMatch's n_sigma


class PseudoLabels(NamedTuple):
    """Classes of n unlabelled slices and their weights in the loss."""

    labels: Tensor  # (n,) int64
    confidences: Tensor  # (n,) float32 in [0, 1]

    def overridden_by(self, known: Tensor) -> "PseudoLabels":
        """Known classes (n,) with confidence 1; these pseudo-labels where UNLABELLED."""
        is_known = known != UNLABELLED
        return PseudoLabels(
            torch.where(is_known, known, self.labels),
            self.confidences.masked_fill(is_known, 1.0),
        )


def class_shares(labels: Tensor, num_classes: int) -> Tensor:
    """(C,) float64 shares of the classes among the labels (n,) of all ranks (collective)."""
    known = nn.functional.one_hot(labels, num_classes)
    counts = dist.sum_across_ranks(known.sum(dim=0).double())
    return counts / counts.sum()


@torch.no_grad()
def pseudo_labels(probabilities: Tensor, shares: Tensor) -> PseudoLabels:
    """SoftMatch (Chen et al. 2023, equations 7 to 9) over all slices of all ranks (collective).

    It differs from the paper in three ways. Mean and variance of the confidence are those of this
    epoch's slices, not running ones. The class distribution is aligned with that of the labelled
    slices by Sinkhorn iterations. And the aligned probabilities give the labels, not only their
    weights. This assumes the same class mix in both, which is the case if labels were drawn at
    random; `class_shift` measures how far the encoder's predictions deviate.

    Args:
        probabilities: (n, C), this rank's rows; may be empty.
        shares: (C,), of the labelled slices; sums to 1.
    """
    aligned = balance_assignments(probabilities.double(), shares)
    confidence, labels = aligned.max(dim=1)
    count = aligned.new_tensor(len(aligned))
    moments = torch.stack([confidence.sum(), confidence.square().sum(), count])
    total, squares, num = dist.sum_across_ranks(moments).tolist()
    mean = total / max(num, 1)
    variance = max(squares / max(num, 1) - mean**2, 1e-8)
    below = (mean - confidence).clamp_min(0)
    weights = torch.exp(-below.square() / (2 * variance / _WIDTH**2))
    return PseudoLabels(labels, weights.float())


@torch.no_grad()
def class_shift(probabilities: Tensor, shares: Tensor) -> float:
    """Total variation distance, 0 to 1, between predicted and labelled class mix (collective).

    This is the share of unlabelled slices whose predicted class does not fit into the class mix of
    the labelled ones.

    Args:
        probabilities: (n, C), this rank's rows; may be empty.
        shares: (C,), of the labelled slices; sums to 1.
    """
    believed = dist.sum_across_ranks(probabilities.double().sum(dim=0))
    believed = believed / believed.sum().clamp_min(1e-12)
    return float((believed - shares).abs().sum() / 2)


@torch.no_grad()
def balance_assignments(probabilities: Tensor, shares: Tensor) -> Tensor:
    """Scale (n, C) so that the columns over all ranks get the given shares (collective).

    Sinkhorn & Knopp 1967. Rows of the result sum to 1; columns have their shares approximately.
    A row that is entirely in classes with a share of 0 becomes 0.
    """
    num_rows = dist.count_across_ranks(len(probabilities), probabilities.device)
    balanced = probabilities
    for _ in range(_NUM_BALANCING):
        mass = dist.sum_across_ranks(balanced.sum(dim=0))
        balanced = balanced * (shares * num_rows / mass.clamp_min(1e-12))
        balanced = balanced / balanced.sum(dim=1, keepdim=True).clamp_min(1e-12)
    return balanced
