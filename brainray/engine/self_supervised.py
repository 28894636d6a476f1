"""Training without labels: a pretext task, alone or with the clustering loss.

The resulting encoder can initialise semi-supervised training (``encoder.weights=PATH``).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from brainray import dist
from brainray.config import PretextName, SelfSupervisionConfig
from brainray.engine.forward import infer
from brainray.engine.shard import Images
from brainray.errors import ConfigError, DataError
from brainray.models.features import FeatureEncoder
from brainray.models.ntxent import ContrastivePretext
from brainray.models.pretext import NoPretext, Pretext, PretextOutput
from brainray.models.rotation import RotationPretext
from brainray.models.soft_kmeans import cluster_loss


def build_pretext(name: PretextName, config: SelfSupervisionConfig) -> Pretext:
    """The configured pretext task; a new one needs one file in models and one line here."""
    match name:
        case "contrastive":
            return ContrastivePretext(config.augment, config.temperature, config.projection_dim)
        case "rotation":
            return RotationPretext(config.augment)
        case "none":
            return NoPretext(config.augment)


_MOST_LEFT_OUT = 0.1  # share of the slices of an epoch
_MATE_SHARE = 0.5  # of mates drawn from the group; the others are the slice itself


@dataclass(frozen=True)
class SoftTargets:
    """Mixture targets of this rank's slices, fixed for one refinement round."""

    responsibilities: Tensor  # (n_rank, K) float32
    centers: Tensor  # (K, E) float32

    def of_rows(self, rows: Tensor) -> "SoftTargets":
        """Targets of the slices at these rows (B,)."""
        return SoftTargets(self.responsibilities[rows], self.centers)


@dataclass(frozen=True)
class StepPlan:
    """Number and batch size of an epoch's steps, the same on every rank."""

    num_steps: int
    batch_size: int


def plan_steps(num_images: int, batch_size_per_worker: int, num_ranks: int) -> StepPlan:
    """Plan one pass; slices that do not fill a batch are left out, different ones each epoch.

    If they are more than a tenth, there is one step more, of batches that are smaller but see
    nearly all slices.
    """
    on_each_rank = max(1, num_images // num_ranks)
    batch_size = min(batch_size_per_worker, on_each_rank)
    num_steps, left_out = divmod(on_each_rank, batch_size)
    smaller = on_each_rank // (num_steps + 1)
    if left_out > _MOST_LEFT_OUT * on_each_rank and smaller > 1:
        return StepPlan(num_steps + 1, smaller)
    return StepPlan(num_steps, batch_size)


def check_contrast(plan: StepPlan, num_groups: int, config: SelfSupervisionConfig) -> None:
    """Check that the contrastive loss, which compares slices of different groups, is not always 0.

    Args:
        plan: of this rank's steps.
        num_groups: of all ranks' slices.
        config: named in the errors.

    Raises:
        ConfigError: a step has a single slice.
        DataError: there is a single group.
    """
    if plan.batch_size * dist.world_size() < 2:
        raise ConfigError(
            "encoder.pretext=contrastive compares the slices of a step, but there is only one: "
            f"raise self_supervision.batch_size_per_worker ({config.batch_size_per_worker}), or "
            "add slices"
        )
    if num_groups < 2:
        raise DataError(
            "encoder.pretext=contrastive compares slices of different subjects, but all training "
            "slices are likely of one: add subjects, or set self_supervision.positives=slice"
        )


class Groups:
    """Groups of a rank's slices whose members can replace each other."""

    def __init__(self, numbers: Tensor) -> None:
        """``numbers``: (n,) int64 group of each slice, numbered over all ranks."""
        self.numbers = numbers
        self._sorted = torch.argsort(numbers, stable=True)
        _, places, sizes = torch.unique(numbers, return_inverse=True, return_counts=True)
        self._first = (sizes.cumsum(0) - sizes)[places]
        self._sizes = sizes[places]

    def mates(self, rows: Tensor, generator: Generator) -> Tensor:
        """For each of ``rows`` (B,), itself or, half of the time, a random slice of its group."""
        share, drawn = torch.rand(2, len(rows), generator=generator)
        others = self._sorted[self._first[rows] + (drawn * self._sizes[rows]).long()]
        return torch.where(share < _MATE_SHARE, others, rows)


@dataclass(frozen=True)
class PretextSlices:
    """The slices that one rank learns from."""

    images: Images
    keys: Tensor  # (n,) int64, unique over all ranks
    groups: Groups


@dataclass(frozen=True)
class PretextBatch:
    """Views of the slices of one step, with the targets of the pretext task."""

    images: Tensor  # (V, 1, H, W) float in [0, 1]: first the slices' own views
    keys: Tensor  # (V,) int64 of the slices
    pretext: Pretext
    targets: Tensor  # (V,) int64
    lambda_cluster: float
    soft: SoftTargets | None  # of the slices' own views

    def loss(self, output: PretextOutput) -> dict[str, Tensor]:
        """Pretext loss + lambda * the mean of sum_k gamma_k |z - mu_k|^2 over the own views."""
        terms = {"pretext": self.pretext.loss(output.outputs, self.targets)}
        total = terms["pretext"]
        if self.soft is not None:
            own = output.z[: len(self.soft.responsibilities)]
            terms["cluster"] = cluster_loss(own, self.soft.responsibilities, self.soft.centers)
            total = total + self.lambda_cluster * terms["cluster"]
        return terms | {"total": total}


@dataclass(frozen=True)
class PretextEpoch:
    """One pass over this rank's slices.

    ``seed`` alone determines order, augmentation and dropout; it must differ between epochs and
    ranks.
    """

    slices: PretextSlices  # at least plan.num_steps * plan.batch_size
    pretext: Pretext
    plan: StepPlan
    seed: int
    lambda_cluster: float = 0.0
    soft: SoftTargets | None = None  # of the slices, for the clustering loss

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    def batches(self) -> Iterator[PretextBatch]:
        """Yield one batch per step."""
        images, device = self.slices.images, self.slices.images.device
        torch.manual_seed(self.seed)  # for dropout and stochastic depth of some encoders
        generator = Generator(device).manual_seed(self.seed)
        order_generator = Generator().manual_seed(self.seed)  # CPU: the same order on every device
        order = torch.randperm(len(images), generator=order_generator)
        num_used = self.plan.num_steps * self.plan.batch_size
        rows_of_steps = list(order[:num_used].split(self.plan.batch_size))
        if self.pretext.wants_mates:
            rows_of_steps = [
                torch.cat([rows, self.slices.groups.mates(rows, order_generator)])
                for rows in rows_of_steps
            ]
        # In one copy, because each copy to a GPU waits for its pending work.
        rows_on_device = torch.stack(rows_of_steps).to(device)
        groups = self.slices.groups.numbers.to(device)
        for rows, batch in zip(rows_on_device, images.batches(rows_of_steps), strict=True):
            views = self.pretext.views(batch.float() / 255, groups[rows], generator)
            yield PretextBatch(
                views.images,
                self.slices.keys[rows].repeat(len(views.images) // len(rows)),
                self.pretext,
                views.targets,
                self.lambda_cluster,
                None if self.soft is None else self.soft.of_rows(rows),
            )


@torch.inference_mode()
def embed_slices(
    encoder: FeatureEncoder, images: Images, *, batch_size: int, precision: str
) -> Tensor:
    """L2-normalised features (n, E) float32 of this rank's slices, in inference mode."""
    batches = images.batches(torch.arange(len(images)).split(batch_size))
    parts = infer(encoder, (batch.float() / 255 for batch in batches), images.device, precision)
    return nn.functional.normalize(torch.cat(parts))


def changed_share(before: Tensor, after: Tensor) -> float:
    """Share of all ranks' slices whose most likely component has changed; inputs (n_rank, K)."""
    changed = (before.argmax(dim=1) != after.argmax(dim=1)).sum()
    counts = torch.stack([changed, torch.tensor(len(after), device=after.device)])
    num_changed, num_rows = dist.sum_across_ranks(counts).tolist()
    return float(num_changed / num_rows)


def is_refined(changes: list[float], config: SelfSupervisionConfig) -> bool:
    """Whether refinement ends: the changed shares of the last ``patience`` rounds are within the
    tolerance, or ``max_rounds`` is reached.
    """
    last = changes[-config.patience :]
    is_settled = len(last) == config.patience and max(last) <= config.tolerance
    return is_settled or len(changes) >= config.max_rounds
