"""Mixup (Zhang et al. 2018) of pairs of labelled slices and of their losses."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from brainray.models.objective import Objective, StepOutputs, Targets


@dataclass(frozen=True)
class Mixup:
    """How the B_l labelled slices of a step are mixed in pairs."""

    share: float  # lambda, in [0.5, 1]: weight of the slice itself; the rest is its partner's
    partners: Tensor  # (B_l,) int64

    @classmethod
    def draw(cls, num_slices: int, alpha: float, seed: int, device: torch.device) -> "Mixup":
        """Draw one lambda ~ Beta(alpha, alpha) for the step, and random partners.

        Unlike in the paper, lambda is folded at 0.5, since swapping a pair gives the same mixture.
        """
        share = random.Random(seed).betavariate(alpha, alpha)
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
        pinned = device.type == "cuda"  # lets the copy to a GPU be asynchronous
        partners = torch.randperm(num_slices, generator=generator, pin_memory=pinned)
        return cls(max(share, 1 - share), partners.to(device, non_blocking=True))

    def images(self, images: Tensor) -> Tensor:
        """Images (B_l, 1, H, W) mixed with those of their partners."""
        return torch.lerp(images[self.partners], images, self.share)

    def loss(
        self, objective: Objective, outputs: StepOutputs, labels: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """Loss terms for mixed slices; terms of all objectives are linear in the mixed labels."""
        own = objective.loss(outputs, labels, targets)
        partner_terms = objective.loss(outputs, labels[self.partners], targets)
        return {name: torch.lerp(partner_terms[name], own[name], self.share) for name in own}
