"""Consistency: cross entropy of augmented slices with pseudo-labels of the averaged encoder."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from brainray.models.objective import StepOutputs, Targets


@dataclass(frozen=True)
class Consistency:
    """ramp * lambda * L_consistency(unlabelled).

    FixMatch (Sohn et al. 2020) with the soft confidence weights of SoftMatch (Chen et al. 2023)
    and an averaged teacher (Tarvainen & Valpola 2017). Unlike there, the teacher predicts once per
    epoch, when all slices are embedded anyway, and not in every step, which saves a forward pass.
    """

    lambda_consistency: float

    def __call__(
        self, outputs: StepOutputs, labels: Tensor, targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = consistency_loss(
            outputs.unlabelled.logits, targets.pseudo_labels, targets.confidences
        )
        return targets.ramp * self.lambda_consistency * loss, {"consistency": loss}


def consistency_loss(logits: Tensor, pseudo_labels: Tensor, confidences: Tensor) -> Tensor:
    """(1/N) sum_i w_i CE(softmax(logits_i), y_i), a scalar; uncertain slices hardly count.

    Args:
        logits: (N, C), of the augmented slices.
        pseudo_labels: y, (N,) int64.
        confidences: w, (N,) in [0, 1].
    """
    each = F.cross_entropy(logits, pseudo_labels, reduction="none")
    return (confidences * each).sum() / max(len(each), 1)
