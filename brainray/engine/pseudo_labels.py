"""What the encoder makes of unlabelled slices, as targets of the next epoch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from brainray import dist
from brainray.schema import UNLABELLED

_NUM_BALANCING = 20
_WIDTH = 2.0  # standard deviations, SoftMatch's n_sigma


class PseudoLabels(NamedTuple):
    """Classes of n unlabelled slices, and how far to trust each."""

    labels: Tensor  # (n,) int64
    confidences: Tensor  # (n,) float32 in [0, 1]

    def unless_inherited(self, inherited: Tensor) -> "PseudoLabels":
        """The classes (n,) that slices inherit, fully trusted; these where that is UNLABELLED."""
        inherits = inherited != UNLABELLED
        return PseudoLabels(
            torch.where(inherits, inherited, self.labels),
            self.confidences.masked_fill(inherits, 1.0),
        )


def class_shares(labels: Tensor, num_classes: int) -> Tensor:
    """(C,) float64, of the labels (n,) of all ranks (collective)."""
    known = nn.functional.one_hot(labels, num_classes)
    counts = dist.sum_across_ranks(known.sum(dim=0).double())
    return counts / counts.sum()


@torch.no_grad()
def pseudo_labels(probabilities: Tensor, shares: Tensor) -> PseudoLabels:
    """SoftMatch (Chen et al. 2023, equations 7 to 9) over all slices of all ranks (collective).

    Departures: mean and variance of the confidence are of this epoch's slices, not running ones,
    and the distribution is aligned with the labelled slices' by Sinkhorn's iterations. That takes
    the classes to be mixed alike in both, as they are where labels were drawn at random
    (`class_shift` tells how far what the encoder believes is from it).

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
    """Share of the unlabelled slices that the encoder believes of other classes than the labelled
    ones' mix has room for: total variation of the two distributions, 0 to 1 (collective).

    Args:
        probabilities: (n, C), this rank's rows; may be empty.
        shares: (C,), of the labelled slices; sums to 1.
    """
    believed = dist.sum_across_ranks(probabilities.double().sum(dim=0))
    believed = believed / believed.sum().clamp_min(1e-12)
    return float((believed - shares).abs().sum() / 2)


@torch.no_grad()
def balance_assignments(probabilities: Tensor, shares: Tensor) -> Tensor:
    """(n, C): rows scaled by column until all ranks' columns have the given shares (collective).

    Sinkhorn & Knopp 1967; it ends with rows that sum to 1, and columns nearly in their shares.
    """
    num_rows = dist.count_across_ranks(len(probabilities), probabilities.device)
    balanced = probabilities
    for _ in range(_NUM_BALANCING):
        mass = dist.sum_across_ranks(balanced.sum(dim=0))
        balanced = balanced * (shares * num_rows / mass.clamp_min(1e-12))
        balanced = balanced / balanced.sum(dim=1, keepdim=True)
    return balanced
