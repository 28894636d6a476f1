"""The anchored objective: consistency and anchored prototypes, so head and clusters agree."""

from dataclasses import dataclass

from torch import Tensor

from brainray.models.consistency import ConsistencyObjective
from brainray.models.objective import StepOutputs, StepTargets
from brainray.models.prototype import PrototypeObjective


@dataclass(frozen=True)
class AnchoredObjective:
    """`ConsistencyObjective` plus `PrototypeObjective`, with a single cross entropy."""

    consistency: ConsistencyObjective
    prototype: PrototypeObjective

    uses_unlabelled = True

    def loss(self, outputs: StepOutputs, targets: StepTargets) -> dict[str, Tensor]:
        terms = self.consistency.loss(outputs, targets)
        clustering = self.prototype.clustering(outputs, targets)
        return terms | clustering | {"total": terms["total"] + clustering["total"]}
