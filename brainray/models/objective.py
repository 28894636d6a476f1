"""The protocol of objectives: a loss of the encoder's outputs for a batch."""

from typing import NamedTuple, Protocol

from torch import Tensor

from brainray.models.encoder import EncoderOutput


class StepSizes(NamedTuple):
    """Numbers of slices in a step on one rank."""

    labelled: int
    unlabelled: int  # 0 with objectives that do not use them, and where there are too few


class StepOutputs(NamedTuple):
    """Outputs of the encoder for the two parts of a step, with gradients."""

    labelled: EncoderOutput  # of B_l slices
    unlabelled: EncoderOutput  # of B_u slices


class Targets(NamedTuple):
    """Targets of n unlabelled slices, from the last epoch's encoder and mixture.

    They are constants, not differentiated.
    """

    responsibilities: Tensor  # (n, K) float32, gamma
    pseudo_labels: Tensor  # (n,) int64 classes: inherited, or predicted by the last epoch
    confidences: Tensor  # (n,) float32 in [0, 1], weights of the pseudo-labels
    centers: Tensor  # (K, E) float32, mu in the space of z
    class_of_cluster: Tensor  # (K,) int64
    ramp: float  # in [0, 1]: weight of targets that the run generated itself

    def of_rows(self, rows: Tensor) -> "Targets":
        """Targets of the slices at these rows (B_u,)."""
        return self._replace(
            responsibilities=self.responsibilities[rows],
            pseudo_labels=self.pseudo_labels[rows],
            confidences=self.confidences[rows],
        )


class Objective(Protocol):
    """An objective as the engine uses it.

    ``loss`` returns named terms; the step minimises ``total``, the others are logged. Every rank
    has the same number of slices, so the mean of the ranks' losses, which DDP's gradient averaging
    minimises, is the loss of the global batch.
    """

    @property
    def uses_unlabelled(self) -> bool:
        """Whether a step takes unlabelled slices; if not, all of its slices are labelled."""
        ...

    @property
    def learns_pseudo_labels(self) -> bool:
        """Whether the loss depends on the pseudo-labels, which may be inherited."""
        ...

    def loss(self, outputs: StepOutputs, labels: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Scalar terms of a step. Without unlabelled slices, their terms are 0.

        Args:
            outputs: of the encoder.
            labels: (B_l,) int64 class indices of the labelled slices.
            targets: of the B_u unlabelled slices.
        """
        ...
