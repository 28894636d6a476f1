"""What a rank learns from in one epoch, and one pass of inference over its slices."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from brainray.config import AugmentConfig
from brainray.engine.forward import infer
from brainray.engine.shard import Images, PixelScale, SliceShard
from brainray.models.augment import augment
from brainray.models.encoder import EncoderOutput
from brainray.models.mixup import Mixup
from brainray.models.objective import Objective, StepOutputs, StepSizes, Targets


@dataclass(frozen=True)
class EpochPlan:
    """Layout of an epoch, the same on every rank."""

    num_steps: int  # batches on each rank
    sizes: StepSizes
    is_mostly_unlabelled: bool  # whether most slices are unlabelled


def plan_epoch(
    objective: Objective, num_labelled: int, num_unlabelled: int, batch: StepSizes, num_ranks: int
) -> EpochPlan:
    """Plan one pass over the unlabelled slices of all ranks, or over the labelled ones if more.

    All objectives have the same number of steps and image passes; a control, which uses no
    unlabelled slices, has as many more labelled ones, on top of that pass. So has every objective
    if there are fewer unlabelled slices than a batch of one rank: these are clustered but not
    trained on, as their pseudo-labels, aligned with the class mix of the labelled slices, would
    reflect that mix more than the slices themselves. This does not depend on the number of ranks,
    unless there are more of them than unlabelled slices.

    Args:
        objective: the loss.
        num_labelled: slices on all ranks.
        num_unlabelled: slices on all ranks.
        batch: configured sizes of a step on one rank.
        num_ranks: number of ranks.
    """
    fills_a_batch = num_unlabelled >= max(batch.unlabelled, num_ranks)
    is_mostly_unlabelled = num_unlabelled >= num_labelled
    num_passed, step_size = (
        (num_unlabelled, batch.unlabelled)
        if is_mostly_unlabelled
        else (num_labelled, batch.labelled)
    )
    return EpochPlan(
        num_steps=-(-num_passed // (step_size * num_ranks)),
        sizes=batch if objective.uses_unlabelled and fills_a_batch else StepSizes(sum(batch), 0),
        is_mostly_unlabelled=is_mostly_unlabelled,
    )


@dataclass(frozen=True)
class StepBatch:
    """Augmented and standardised slices of one step with their labels and targets."""

    images: Tensor  # (B, 1, H, W) float32: labelled slices, then unlabelled ones
    keys: Tensor  # (B,) int64
    labels: Tensor  # (B_l,) int64, of the labelled slices
    targets: Targets  # of the unlabelled slices
    objective: Objective
    mixup: Mixup | None

    def loss(self, output: EncoderOutput) -> dict[str, Tensor]:
        """Terms of the objective for the encoder's output."""
        num_labelled = len(self.labels)
        outputs = StepOutputs(
            labelled=EncoderOutput(output.z[:num_labelled], output.logits[:num_labelled]),
            unlabelled=EncoderOutput(output.z[num_labelled:], output.logits[num_labelled:]),
        )
        if self.mixup is not None:
            return self.mixup.loss(self.objective, outputs, self.labels, self.targets)
        return self.objective.loss(outputs, self.labels, self.targets)


@dataclass(frozen=True)
class EpochData:
    """Training slices of this rank for one epoch, with their augmentation.

    ``seed`` alone determines order and augmentation; it must differ between epochs and ranks. The
    smaller of the labelled and the unlabelled set is cycled.
    """

    labelled: SliceShard
    unlabelled: SliceShard
    objective: Objective
    targets: Targets  # of the unlabelled slices
    sizes: StepSizes
    num_steps: int  # the same on every rank
    scale: PixelScale
    augmentation: AugmentConfig
    augmentation_unlabelled: AugmentConfig
    seed: int
    side: int | None = None  # that slices are resized to
    mixup_alpha: float = 0.0  # mixup of labelled slices if above 0

    def batches(self) -> Iterator[StepBatch]:
        """Yield one batch per step."""
        device = self.labelled.images.device
        generator = Generator(device).manual_seed(self.seed)
        order = list(
            _cycle_rows(len(self.labelled), self.sizes.labelled, self.num_steps, seed=2 * self.seed)
        )
        order_unlabelled = list(
            _cycle_rows(
                len(self.unlabelled), self.sizes.unlabelled, self.num_steps, seed=2 * self.seed + 1
            )
        )
        drawn = self.labelled.images.batches(order)
        drawn_unlabelled = self.unlabelled.images.batches(order_unlabelled)
        # In one copy, because each copy to a GPU waits for its pending work.
        rows_of_steps = torch.stack(order).to(device)
        rows_of_steps_unlabelled = torch.stack(order_unlabelled).to(device)
        for step in range(self.num_steps):
            views = self._view(next(drawn), self.augmentation, generator)
            views_unlabelled = self._view(
                next(drawn_unlabelled), self.augmentation_unlabelled, generator
            )
            mixup = None
            if self.mixup_alpha:
                mixup = Mixup.draw(len(views), self.mixup_alpha, self.seed + step, device)
                views = mixup.images(views)
            rows, rows_unlabelled = rows_of_steps[step], rows_of_steps_unlabelled[step]
            yield StepBatch(
                self.scale.standardise(torch.cat([views, views_unlabelled])),
                torch.cat([self.labelled.keys[rows], self.unlabelled.keys[rows_unlabelled]]),
                self.labelled.labels[rows],
                self.targets.of_rows(rows_unlabelled),
                self.objective,
                mixup,
            )

    def _view(self, images: Tensor, augmentation: AugmentConfig, generator: Generator) -> Tensor:
        return augment(self.scale.to_unit(images, self.side), augmentation, generator)


@torch.inference_mode()
def embed(
    model: nn.Module,
    images: Images,
    *,
    scale: PixelScale,
    batch_size: int,
    precision: str,
    side: int | None = None,
) -> EncoderOutput:
    """Embeddings (n, E) and logits (n, C) of n slices in inference mode, resized to ``side``."""
    batches = images.batches(torch.arange(len(images)).split(batch_size))
    standardised = (scale.standardise(scale.to_unit(batch, side)) for batch in batches)
    outputs: list[EncoderOutput] = infer(model, standardised, images.device, precision)
    return EncoderOutput(
        torch.cat([output.z for output in outputs]),
        torch.cat([output.logits for output in outputs]),
    )


def _cycle_rows(num_rows: int, batch_size: int, num_steps: int, *, seed: int) -> Iterator[Tensor]:
    """Yield ``num_steps`` batches of row indices from repeated shuffled passes."""
    generator = Generator().manual_seed(seed)  # on the CPU: the same order on every device
    assert num_rows > 0 or batch_size == 0, "a rank without slices cannot fill batches"
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(num_steps):
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(num_rows, generator=generator)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
