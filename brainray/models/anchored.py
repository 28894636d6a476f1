"""The anchored objective: consistency and anchored prototypes, so head and clusters agree."""

from dataclasses import dataclass

from torch import Tensor

from brainray.models.consistency import ConsistencyObjective
from brainray.models.objective import StepOutputs, Targets
from brainray.models.prototype import PrototypeObjective


@dataclass(frozen=True)
class AnchoredObjective:
    """`ConsistencyObjective` plus `PrototypeObjective`, with a single cross entropy."""

    consistency: ConsistencyObjective
    prototype: PrototypeObjective

    uses_unlabelled = True
    learns_pseudo_labels = True

    def loss(self, outputs: StepOutputs, labels: Tensor, targets: Targets) -> dict[str, Tensor]:
        terms = self.consistency.loss(outputs, labels, targets)
        clustering, logged = self.prototype.clustering(outputs, labels, targets)
        return terms | logged | {"total": terms["total"] + clustering}
