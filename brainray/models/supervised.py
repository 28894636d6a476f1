"""The control of all semi-supervised recipes: cross entropy on labelled slices only."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from brainray.models.objective import StepOutputs, StepSizes, StepTargets


@dataclass(frozen=True)
class SupervisedObjective:
    """Equation 1 only, with the same number of image passes as the objective it is compared with.

    A step takes labelled slices in place of unlabelled ones.
    """

    def step_sizes(self, labelled: int, unlabelled: int) -> StepSizes:
        return StepSizes(labelled + unlabelled, 0)

    def loss(self, outputs: StepOutputs, targets: StepTargets) -> dict[str, Tensor]:
        cross_entropy = F.cross_entropy(outputs.labelled.logits, targets.labels)
        return {"total": cross_entropy, "ce": cross_entropy.detach()}
