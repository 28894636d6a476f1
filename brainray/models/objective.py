"""The protocol of objectives: a loss of the encoder's outputs for a batch."""

from typing import NamedTuple, Protocol

from torch import Tensor

from brainray.models.encoder import EncoderOutput


class StepSizes(NamedTuple):
    """Numbers of slices in a step on one rank."""

    labelled: int
    unlabelled: int


class StepOutputs(NamedTuple):
    """Outputs of the encoder for the two parts of a step, with gradients."""

    labelled: EncoderOutput  # of B_l slices
    unlabelled: EncoderOutput  # of B_u slices


class StepTargets(NamedTuple):
    """Targets of a step's loss; constants, not differentiated."""

    labels: Tensor  # (B_l,) int64 class indices
    responsibilities: Tensor  # (B_u, K) float32, gamma of the unlabelled slices
    pseudo_labels: Tensor  # (B_u,) int64 classes: known, or predicted by the last epoch's encoder
    confidences: Tensor  # (B_u,) float32 in [0, 1], weights of the pseudo-labels
    centers: Tensor  # (K, E) float32, mu in the space of z
    class_of_cluster: Tensor  # (K,) int64
    ramp: float  # in [0, 1]: weight of targets that the run generated itself


class Objective(Protocol):
    """An objective as the engine uses it.

    ``loss`` returns named terms; the step minimises ``total``, the others are logged. Every rank
    has the same number of slices, so the mean of the ranks' losses, which DDP's gradient averaging
    minimises, is the loss of the global batch.
    """

    @property
    def uses_unlabelled(self) -> bool:
        """Whether a step takes unlabelled slices; if not, it takes labelled ones in their place."""
        ...

    def loss(self, outputs: StepOutputs, targets: StepTargets) -> dict[str, Tensor]:
        """Scalar terms of a step."""
        ...


def step_sizes(objective: Objective, labelled: int, unlabelled: int) -> StepSizes:
    """Sizes of a step from the configured batch sizes; their sum is the same for all objectives."""
    if objective.uses_unlabelled:
        return StepSizes(labelled, unlabelled)
    return StepSizes(labelled + unlabelled, 0)
