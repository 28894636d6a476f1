"""Means of named losses over many steps."""

from collections.abc import Mapping

import torch
from torch import Tensor

from brainray import dist


class MeanLosses:
    """Sums scalars on their device, because reading one per step would stall its queue."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._num_steps = 0

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add the terms of a step; every step must have the same names."""
        for name, value in terms.items():
            self._sums[name] = value.detach() + self._sums.get(name, 0.0)
        self._num_steps += 1

    def over_ranks(self) -> dict[str, float]:
        """Means over all steps and ranks (collective; every rank must have as many steps)."""
        totals = dist.sum_across_ranks(torch.stack(list(self._sums.values())).double())
        means = (totals / (self._num_steps * dist.world_size())).tolist()
        return dict(zip(self._sums, means, strict=True))
