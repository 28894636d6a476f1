"""The protocol of pretext tasks (views of a batch, a head and a loss) and the model they train."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from brainray.config import AugmentConfig
from brainray.models.augment import augment
from brainray.models.features import FeatureEncoder


class Views(NamedTuple):
    """V views of a batch of B slices, as one batch because DDP needs one forward pass per step.

    The first B are views of the slices in their order, which the clustering loss uses.
    """

    images: Tensor  # (V, 1, H, W) float in [0, 1]
    targets: Tensor  # (V,) int64: target of the pretext task


class PretextOutput(NamedTuple):
    """Output of a forward pass for V views."""

    z: Tensor  # (V, E) float32, L2-normalised
    outputs: Tensor  # (V, P) float32, of the pretext head


class Pretext(Protocol):
    """A pretext task as the engine uses it.

    If it ``wants_mates``, a batch consists of slices followed, in the same order, by a mate for
    each: itself or another slice of its group.

    Every rank has the same number of slices, so the mean of the ranks' losses, which DDP's gradient
    averaging minimises, is the loss of the global batch.
    """

    wants_mates: bool

    def head(self, embedding_dim: int) -> nn.Module:
        """Module that maps features (V, E) to the outputs that `loss` takes."""
        ...

    def views(self, images: Tensor, groups: Tensor, generator: Generator) -> Views:
        """Views of slices (B, 1, H, W) float in [0, 1] with groups (B,) int64 over all ranks."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scalar loss from the head's outputs for the views and their targets."""
        ...


@dataclass(frozen=True)
class NoPretext:
    """One augmented view and no pretext loss: the ablation with deep clustering only."""

    augmentation: AugmentConfig

    wants_mates = False

    def head(self, embedding_dim: int) -> nn.Module:
        return nn.Identity()

    def views(self, images: Tensor, groups: Tensor, generator: Generator) -> Views:
        return Views(augment(images, self.augmentation, generator), groups)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * 0.0


class PretextModel(nn.Module):
    """An encoder with a pretext head on its features."""

    def __init__(self, encoder: FeatureEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> PretextOutput:
        features = self.encoder(images)
        with torch.autocast(images.device.type, enabled=False):
            return PretextOutput(F.normalize(features), self.head(features))
