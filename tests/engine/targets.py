"""Targets of an epoch before which nothing is known."""

import torch

from brainray.models.objective import Targets


def uninformed(num_slices: int, embedding_dim: int) -> Targets:
    """Of two clusters at the origin that explain every slice alike."""
    return Targets(
        responsibilities=torch.full((num_slices, 2), 0.5),
        pseudo_labels=torch.zeros(num_slices, dtype=torch.int64),
        confidences=torch.zeros(num_slices),
        centers=torch.zeros(2, embedding_dim),
        class_of_cluster=torch.arange(2),
        ramp=1.0,
    )
