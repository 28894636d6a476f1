"""The rotation pretext task: predict by how many quarter turns a slice was rotated."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from brainray.config import AugmentConfig
from brainray.models.augment import augment
from brainray.models.pretext import Views

NUM_TURNS = 4

_MAX_ROTATION_DEG = 15.0


@dataclass(frozen=True)
class RotationPretext:
    """Cross entropy over 0, 90, 180 and 270 degrees, all four for each slice (Gidaris et al. 2018).

    Vertical flips and rotations by more than 15 degrees are excluded from the augmentation, since
    they would make the answer ambiguous.
    """

    wants_mates = False

    augmentation: AugmentConfig

    def head(self, embedding_dim: int) -> nn.Module:
        return nn.Linear(embedding_dim, NUM_TURNS)

    def views(self, images: Tensor, groups: Tensor, generator: Generator) -> Views:
        upright = self.augmentation.model_copy(
            update={
                "vertical_flip": 0.0,
                "max_rotation_deg": min(_MAX_ROTATION_DEG, self.augmentation.max_rotation_deg),
            }
        )
        images = augment(images, upright, generator)
        turns = torch.arange(NUM_TURNS, device=images.device)
        return Views(  # the upright ones first
            torch.cat([images.rot90(turn, dims=(2, 3)) for turn in range(NUM_TURNS)]),
            turns.repeat_interleave(len(images)),
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float(), targets)
