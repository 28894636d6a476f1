"""The contrastive loss between two views of a slice and all others: NT-Xent."""

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
    """Two augmented views of each slice are to be found among the views of all ranks."""

    augmentation: AugmentConfig
    temperature: float
    projection_dim: int

    def head(self, embedding_dim: int) -> nn.Module:
        """SimCLR's projection; without batch normalisation, which leaks between views of a rank."""
        return nn.Sequential(
            nn.Linear(embedding_dim, embedding_dim),
            nn.ReLU(),
            nn.Linear(embedding_dim, self.projection_dim),
        )

    def views(self, images: Tensor, generator: Generator) -> Views:
        both = [augment(images, self.augmentation, generator) for _ in range(2)]
        rows = torch.arange(len(images), device=images.device)
        return Views(torch.cat(both), rows.repeat(2), rows.repeat(2), 2 * len(rows))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        first, second = outputs.chunk(2)
        return nt_xent(first, second, self.temperature)


def nt_xent(
    first: Tensor,  # (B, P) projections of each slice's first view
    second: Tensor,  # (B, P) and of its second
    temperature: float,
) -> Tensor:
    """Mean over this rank's 2 B views of the normalised temperature-scaled cross entropy, a scalar.

    Chen et al. 2020, "A simple framework for contrastive learning", equation 1: for a view i with
    positive j, -log exp(s_ij / t) / sum_{k != i} exp(s_ik / t), s the cosine similarity; the
    denominator holds the positive and the views of all ranks. METHOD B's formula leaves out the
    temperature and the positive term of the denominator. Collective, forwards and backwards, with
    equally many slices on every rank: the ranks' mean loss is that of the global batch.
    """
    num_slices = len(first)
    mine = F.normalize(torch.cat([first, second]).float())
    everyones = dist.gather_rows_with_gradient(mine)
    offset = dist.rank() * len(mine)
    places = torch.arange(len(mine), device=mine.device)
    similarity = mine @ everyones.T / temperature
    # A view is no candidate for itself.
    similarity = similarity.scatter(1, (offset + places)[:, None], -torch.inf)
    positives = offset + places.roll(num_slices)
    return F.cross_entropy(similarity, positives)
