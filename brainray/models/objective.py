"""What every objective is: a share of the batch, and a loss over what the encoder gave."""

from typing import NamedTuple, Protocol

from torch import Tensor


class StepSizes(NamedTuple):
    """Slices of one step on one rank."""

    labelled: int
    unlabelled: int


class StepTargets(NamedTuple):
    """What the loss of one step compares with; constants, not differentiated."""

    labels: Tensor  # (B_l,) int64 class indices
    responsibilities: Tensor  # (B_u, K) float32, gamma of the unlabelled slices
    centers: Tensor  # (K, E) float32, mu in the space of z


class Objective(Protocol):
    """The engine knows objectives by this protocol only.

    ``loss`` returns named terms; the step minimises ``total``, the others are logged. Every rank
    has equally many slices, so the mean of the ranks' losses, which is what DDP's gradient
    averaging minimises, is the loss of the global batch.
    """

    def step_sizes(self, labelled: int, unlabelled: int) -> StepSizes:
        """How many labelled and unlabelled slices a step of the configured sizes takes."""
        ...

    def loss(
        self, logits_labelled: Tensor, z_unlabelled: Tensor, targets: StepTargets
    ) -> dict[str, Tensor]:
        """Scalar terms from logits (B_l, C) and normalised embeddings z (B_u, E)."""
        ...
