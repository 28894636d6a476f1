"""The control of all semi-supervised recipes: cross entropy on labelled slices only."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from brainray.models.objective import StepOutputs, Targets


@dataclass(frozen=True)
class SupervisedObjective:
    """Equation 1 only, with as many image passes as the objective it is compared with."""

    uses_unlabelled = False
    learns_pseudo_labels = False

    def loss(self, outputs: StepOutputs, labels: Tensor, targets: Targets) -> dict[str, Tensor]:
        cross_entropy = F.cross_entropy(outputs.labelled.logits, labels)
        return {"total": cross_entropy, "ce": cross_entropy.detach()}
