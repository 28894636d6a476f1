"""One rank's slices, in memory on the training device."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class PixelScale:
    """Mean and standard deviation of the training images' intensities, in units of [0, 1]."""

    mean: float
    std: float

    def to_unit(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) uint8 to float32 in [0, 1]."""
        return images.float() / 255

    def standardise(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) float in [0, 1] to mean 0 and standard deviation 1, channels last."""
        scaled = (images - self.mean) / self.std
        return scaled.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class SliceShard:
    """Slices of one role on one rank, ordered by sample_id."""

    images: Tensor  # (n, 1, H, W) uint8
    keys: Tensor  # (n,) int64, from sample_id; unique within a split
    labels: Tensor  # (n,) int64 class indices; UNLABELLED where the label may not be read

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class RankData:
    """Everything that one rank trains on and is evaluated with."""

    labelled: SliceShard  # without the validation part
    unlabelled: SliceShard
    validation: SliceShard
    test: SliceShard

    @property
    def fitted_keys(self) -> Tensor:
        """Keys of the slices that the mixture is fitted on: labelled, then unlabelled."""
        return torch.cat([self.labelled.keys, self.unlabelled.keys])


def sample_keys(sample_ids: list[str]) -> NDArray[np.int64]:
    """(n,) int64 from the first 64 bits of each sample_id: a key that tensors can hold."""
    values = np.array([int(identity[:16], 16) for identity in sample_ids], dtype=np.uint64)
    return values.view(np.int64)
