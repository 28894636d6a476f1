"""What every objective is: a share of the batch, and a loss over what the encoder gave."""

from typing import NamedTuple, Protocol

from torch import Tensor

from brainray.models.encoder import EncoderOutput


class StepSizes(NamedTuple):
    """Slices of one step on one rank."""

    labelled: int
    unlabelled: int


class StepOutputs(NamedTuple):
    """What the encoder gave for the two parts of a step, with gradients."""

    labelled: EncoderOutput  # of B_l slices
    unlabelled: EncoderOutput  # of B_u slices


class StepTargets(NamedTuple):
    """What the loss of one step compares with; constants, not differentiated."""

    labels: Tensor  # (B_l,) int64 class indices
    responsibilities: Tensor  # (B_u, K) float32, gamma of the unlabelled slices
    pseudo_labels: Tensor  # (B_u,) int64 classes, as last epoch's encoder sees them
    confidences: Tensor  # (B_u,) float32 in [0, 1], weights of those
    centers: Tensor  # (K, E) float32, mu in the space of z
    class_of_cluster: Tensor  # (K,) int64
    ramp: float  # in [0, 1]: how far targets that the run made itself are trusted by now


class Objective(Protocol):
    """The engine knows objectives by this protocol only.

    ``loss`` returns named terms; the step minimises ``total``, the others are logged. Every rank
    has equally many slices, so the mean of the ranks' losses, which is what DDP's gradient
    averaging minimises, is the loss of the global batch.
    """

    def step_sizes(self, labelled: int, unlabelled: int) -> StepSizes:
        """How many labelled and unlabelled slices a step of the configured sizes takes."""
        ...

    def loss(self, outputs: StepOutputs, targets: StepTargets) -> dict[str, Tensor]:
        """Scalar terms of one step."""
        ...
