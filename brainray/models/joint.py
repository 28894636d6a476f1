"""The joint objective of METHOD A: cross entropy plus soft K-means around the mixture means."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from brainray.models.objective import StepOutputs, Targets


@dataclass(frozen=True)
class JointObjective:
    """L = L_CE(labelled) + lambda * L_cluster(unlabelled); METHOD A, equations 1 and 2.

    Differences from the report: z is L2-normalised, and the second term is weighted by lambda,
    which is in the text of the report but not in its equation.
    """

    lambda_cluster: float

    uses_unlabelled = True
    learns_pseudo_labels = False

    def loss(self, outputs: StepOutputs, labels: Tensor, targets: Targets) -> dict[str, Tensor]:
        cross_entropy = F.cross_entropy(outputs.labelled.logits, labels)
        cluster = cluster_loss(outputs.unlabelled.z, targets.responsibilities, targets.centers)
        total = cross_entropy + self.lambda_cluster * cluster
        return {"total": total, "ce": cross_entropy.detach(), "cluster": cluster.detach()}


def cluster_loss(z: Tensor, responsibilities: Tensor, centers: Tensor) -> Tensor:
    """(1/N) sum_i sum_k gamma_ik ||z_i - mu_k||^2, a scalar; equation 2.

    Args:
        z: (N, E).
        responsibilities: gamma, (N, K), rows sum to 1; not differentiated.
        centers: mu, (K, E); not differentiated.
    """
    # Expanded so that no (N, K, E) tensor is formed; float32 suffices since |z| = 1.
    squared = (
        z.square().sum(dim=1, keepdim=True)
        - 2 * z @ centers.detach().T
        + centers.detach().square().sum(dim=1)
    )
    return (responsibilities.detach() * squared).sum() / max(len(z), 1)
