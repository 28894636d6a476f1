"""The contrastive pretext task and its loss, NT-Xent."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from brainray import dist
from brainray.config import AugmentConfig
from brainray.models.augment import augment
from brainray.models.pretext import Views


@dataclass(frozen=True)
class ContrastivePretext:
    """Match the augmented views of a slice and its mate among the views of all ranks.

    If mates are other slices of the same subject, slices of a subject are never negatives (Azizi et
    al. 2021, "Big self-supervised models advance medical image classification").
    """

    wants_mates = True

    augmentation: AugmentConfig
    temperature: float
    projection_dim: int

    def head(self, embedding_dim: int) -> nn.Module:
        """SimCLR's projection, without batch normalisation, which leaks between views of a rank."""
        return nn.Sequential(
            nn.Linear(embedding_dim, embedding_dim),
            nn.ReLU(),
            nn.Linear(embedding_dim, self.projection_dim),
        )

    def views(self, images: Tensor, groups: Tensor, generator: Generator) -> Views:
        return Views(augment(images, self.augmentation, generator), groups)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        first, second = outputs.chunk(2)
        first_groups, second_groups = targets.chunk(2)
        return nt_xent(first, second, first_groups, second_groups, self.temperature)


def nt_xent(
    first: Tensor,  # (B, P) projections of slices
    second: Tensor,  # (B, P) projections of their mates
    first_groups: Tensor,  # (B,) int64, over all ranks
    second_groups: Tensor,  # (B,)
    temperature: float,
) -> Tensor:
    """Normalised temperature-scaled cross entropy, a scalar: the mean over this rank's 2 B views.

    Chen et al. 2020, "A simple framework for contrastive learning", equation 1: for a view i with
    positive j, -log exp(s_ij / t) / sum_{k != i} exp(s_ik / t), with cosine similarity s. The
    denominator is over the positive and the views of all ranks, except those of the view's own
    group, which includes itself. METHOD B's formula has no temperature and no positive term in the
    denominator. Forward and backward are collective, with the same number of slices on every rank;
    the mean loss of the ranks is that of the global batch.
    """
    num_slices = len(first)
    mine = F.normalize(torch.cat([first, second]).float())
    groups = torch.cat([first_groups, second_groups])
    everyones = dist.gather_equal_rows(mine)
    offset = dist.rank() * len(mine)
    places = torch.arange(len(mine), device=mine.device)
    positives = offset + places.roll(num_slices)
    akin = (groups[:, None] == dist.gather_equal_rows(groups)).scatter(1, positives[:, None], False)
    similarity = (mine @ everyones.T / temperature).masked_fill(akin, -torch.inf)
    return F.cross_entropy(similarity, positives)
