"""METHOD A's clustering term: soft K-means around the mixture means."""

from dataclasses import dataclass

from torch import Tensor

from brainray.models.objective import StepOutputs, Targets


@dataclass(frozen=True)
class SoftKMeans:
    """lambda * L_cluster(unlabelled); METHOD A, equation 2.

    Differences from the report: z is L2-normalised, and the second term is weighted by lambda,
    which is in the text of the report but not in its equation.
    """

    lambda_cluster: float

    def __call__(
        self, outputs: StepOutputs, labels: Tensor, targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = cluster_loss(outputs.unlabelled.z, targets.responsibilities, targets.centers)
        return self.lambda_cluster * loss, {"cluster": loss}


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
