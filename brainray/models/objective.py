"""Objectives: cross entropy on labelled slices, and terms that use unlabelled ones."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch.nn.functional as F
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


class Term(Protocol):
    """A summand of an objective, one class per file."""

    def __call__(
        self, outputs: StepOutputs, labels: Tensor, targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted term of a step, a scalar, and its parts by name, which are logged; parts of
        unlabelled slices are 0 if there are none.

        Args:
            outputs: of the encoder.
            labels: (B_l,) int64 class indices of the labelled slices.
            targets: of the B_u unlabelled slices.
        """
        ...


@dataclass(frozen=True)
class Objective:
    """L = L_CE(labelled) + sum of terms; METHOD A's equation 1 is L_CE. Without terms, it is the
    control of all others.

    Every rank has the same number of slices, so the mean of the ranks' losses, which DDP's gradient
    averaging minimises, is the loss of the global batch.
    """

    terms: tuple[Term, ...] = ()

    @property
    def uses_unlabelled(self) -> bool:
        """Whether a step takes unlabelled slices; if not, it takes as many more labelled ones."""
        return bool(self.terms)

    def loss(self, outputs: StepOutputs, labels: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Named scalars of a step, which minimises ``total``; the others are logged."""
        total = cross_entropy = F.cross_entropy(outputs.labelled.logits, labels)
        logged = {"ce": cross_entropy.detach()}
        for term in self.terms:
            value, parts = term(outputs, labels, targets)
            total = total + value
            logged |= {name: part.detach() for name, part in parts.items()}
        return {"total": total} | logged
