"""A clustering term with mixture means as label-anchored prototypes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from brainray.models.objective import StepOutputs, Targets


@dataclass(frozen=True)
class Prototype:
    """lambda * [ramp * L_prototype(unlabelled) + L_anchor(labelled)].

    L_prototype = -(1/N_u) sum_i c_i sum_k gamma_ik log p_ik, where c_i is the confidence in the
    pseudo-label of the slice. METHOD A's second term pulls z towards its mean, and nothing
    keeps the means apart. Here z has to be nearer to its own prototype than to the others (Li et
    al. 2021, "Prototypical Contrastive Learning", equation 10, with the soft assignments of the
    mixture), and labelled slices have to be nearest to a prototype of their class.
    """

    lambda_cluster: float
    temperature: float

    def __call__(
        self, outputs: StepOutputs, labels: Tensor, targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_near_labelled = log_nearness(outputs.labelled.z, targets.centers, self.temperature)
        anchor = anchor_loss(log_near_labelled, labels, targets.class_of_cluster)
        log_near = log_nearness(outputs.unlabelled.z, targets.centers, self.temperature)
        each = -(targets.responsibilities * log_near).sum(dim=1)
        prototype = (targets.confidences * each).sum() / max(len(each), 1)
        weighted = self.lambda_cluster * (targets.ramp * prototype + anchor)
        return weighted, {"cluster": prototype, "anchor": anchor}


def log_nearness(z: Tensor, centers: Tensor, temperature: float) -> Tensor:
    """(N, K): log softmax over k of cos(z_i, mu_k) / temperature, of z (N, E) and mu (K, E)."""
    prototypes = F.normalize(centers.detach())
    return F.log_softmax(F.normalize(z) @ prototypes.T / temperature, dim=1)


def anchor_loss(log_near: Tensor, labels: Tensor, class_of_cluster: Tensor) -> Tensor:
    """-(1/N) sum_i log sum_{k of class y_i} p_ik, a scalar; any cluster of the class is accepted.

    Args:
        log_near: log p, (N, K).
        labels: y, (N,) int64; slices of classes without a cluster contribute nothing.
        class_of_cluster: (K,) int64.
    """
    belongs = labels[:, None] == class_of_cluster  # (N, K)
    has_cluster = belongs.any(dim=1)
    # Rows without a cluster are masked at the end: to select the others would synchronise a GPU.
    kept = belongs | ~has_cluster[:, None]
    own = log_near.masked_fill(~kept, -torch.inf).logsumexp(dim=1)
    return -torch.where(has_cluster, own, 0.0).sum() / max(len(labels), 1)
