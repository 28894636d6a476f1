"""What every pretext task is: views of a batch, a head and a loss; and the model they train."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from brainray.config import AugmentConfig
from brainray.models.augment import augment
from brainray.models.features import FeatureEncoder


class Views(NamedTuple):
    """V views of a batch of B slices, as one batch: DDP wants one forward a step."""

    images: Tensor  # (V, 1, H, W) float in [0, 1]
    rows: Tensor  # (V,) int64 in [0, B): the slice of the batch that is seen
    targets: Tensor  # (V,) int64: what the pretext asks of the view
    num_clustered: int  # leading views that a clustering loss may pull together


class PretextOutput(NamedTuple):
    """What one forward gives for V views."""

    z: Tensor  # (V, E) float32, L2-normalised
    outputs: Tensor  # (V, P) float32, of the pretext's head


class Pretext(Protocol):
    """The engine knows pretext tasks by this protocol only.

    A batch of one that ``wants_mates`` is slices and, in the same order, a mate for each: itself,
    or another slice of its group.

    Every rank has equally many slices, so that the ranks' mean loss, which DDP's averaging of
    gradients minimises, is the loss of the global batch.
    """

    wants_mates: bool

    def head(self, embedding_dim: int) -> nn.Module:
        """Features (V, E) to what `loss` compares."""
        ...

    def views(self, images: Tensor, groups: Tensor, generator: Generator) -> Views:
        """Views of slices (B, 1, H, W) float in [0, 1], of groups (B,) int64 over all ranks."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A scalar, from the head's outputs for the views and their targets."""
        ...


class NoPretext:
    """One augmented view and nothing to learn from it: deep clustering alone, the ablation."""

    wants_mates = False

    def __init__(self, augmentation: AugmentConfig) -> None:
        self.augmentation = augmentation

    def head(self, embedding_dim: int) -> nn.Module:
        return nn.Identity()

    def views(self, images: Tensor, groups: Tensor, generator: Generator) -> Views:
        rows = torch.arange(len(images), device=images.device)
        return Views(augment(images, self.augmentation, generator), rows, rows, len(rows))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * 0.0


class PretextModel(nn.Module):
    """An encoder and a pretext's head on its features."""

    def __init__(self, encoder: FeatureEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> PretextOutput:
        features = self.encoder(images)
        with torch.autocast(images.device.type, enabled=False):
            return PretextOutput(F.normalize(features), self.head(features))
