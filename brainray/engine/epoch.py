"""One pass of training, and one of inference."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import update_bn

from brainray.config import AugmentConfig
from brainray.engine.finite import GradientWatch, carried_by_gradient
from brainray.engine.forward import autocast, forward_passes
from brainray.engine.mean_losses import MeanLosses
from brainray.engine.shard import Images, PixelScale, SliceShard
from brainray.models.augment import augment
from brainray.models.encoder import EncoderOutput
from brainray.models.mixup import Mixup
from brainray.models.objective import Objective, StepOutputs, StepSizes, StepTargets

_SLICES_FOR_STATISTICS = 2048


@dataclass(frozen=True)
class EpochTargets:
    """What the last epoch's encoder and mixture made of the unlabelled slices, for one epoch.

    Rows are as in the unlabelled shard, of n slices.
    """

    responsibilities: Tensor  # (n, K) float32
    pseudo_labels: Tensor  # (n,) int64
    confidences: Tensor  # (n,) float32 in [0, 1]
    centers: Tensor  # (K, E) float32
    class_of_cluster: Tensor  # (K,) int64
    ramp: float  # in [0, 1]

    def of_step(self, labels: Tensor, rows: Tensor) -> StepTargets:
        """Of a step with labelled slices of those labels and these unlabelled rows."""
        return StepTargets(
            labels=labels,
            responsibilities=self.responsibilities[rows],
            pseudo_labels=self.pseudo_labels[rows],
            confidences=self.confidences[rows],
            centers=self.centers,
            class_of_cluster=self.class_of_cluster,
            ramp=self.ramp,
        )


@dataclass(frozen=True)
class EpochResult:
    """What one pass of training tells."""

    losses: dict[str, float]  # mean of each term over all steps and ranks
    data_wait_s: float  # this rank's time until its batches were at hand


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch is made of, the same on every rank and for every objective."""

    num_steps: int  # batches on each rank
    has_pool: bool  # whether the unlabelled term looks at unlabelled slices, not at labelled ones
    is_mostly_unlabelled: bool  # else the labelled slices tell what slices are like


def plan_epoch(
    num_labelled: int, num_unlabelled: int, batch_size_per_worker: int, num_ranks: int
) -> EpochPlan:
    """One pass over the unlabelled slices of all ranks, or over the labelled ones if they are more.

    A control, which takes labelled slices in the place of the unlabelled ones, has as many steps
    and image passes. Unlabelled slices that do not fill a batch on every rank are clustered, and
    not learned from: their pseudo-labels, which are aligned with the classes of the labelled ones,
    would say more of these than of them.
    """
    num_slices = max(num_labelled, num_unlabelled)
    return EpochPlan(
        num_steps=-(-num_slices // (batch_size_per_worker * num_ranks)),
        has_pool=num_unlabelled >= batch_size_per_worker * num_ranks,
        is_mostly_unlabelled=num_unlabelled >= num_labelled,
    )


@dataclass(frozen=True)
class StepBatch:
    """One step's slices, augmented and standardised, and what its loss compares with."""

    images: Tensor  # (B, 1, H, W) float32: labelled slices, then unlabelled ones
    keys: Tensor  # (B,) int64
    targets: StepTargets
    mixup: Mixup | None

    def loss(self, objective: Objective, output: EncoderOutput) -> dict[str, Tensor]:
        """The objective's terms of what the encoder made of the images."""
        num_labelled = len(self.targets.labels)
        outputs = StepOutputs(
            labelled=EncoderOutput(output.z[:num_labelled], output.logits[:num_labelled]),
            unlabelled=EncoderOutput(output.z[num_labelled:], output.logits[num_labelled:]),
        )
        if self.mixup is not None:
            return self.mixup.loss(objective, outputs, self.targets)
        return objective.loss(outputs, self.targets)


@dataclass(frozen=True)
class EpochData:
    """What an epoch learns from on this rank, and how it is seen.

    Order and augmentation follow from ``seed`` alone, which must differ between epochs and ranks.
    Whichever of labelled and unlabelled slices are fewer cycle.
    """

    labelled: SliceShard
    unlabelled: SliceShard
    targets: EpochTargets
    sizes: StepSizes
    steps: int  # the same on every rank
    scale: PixelScale
    augmentation: AugmentConfig
    augmentation_unlabelled: AugmentConfig
    seed: int
    side: int | None = None  # that slices are resized to
    mixup_alpha: float = 0.0  # labelled slices are mixed above 0

    def batches(self) -> Iterator[StepBatch]:
        """One for each step."""
        device = self.labelled.images.device
        generator = Generator(device).manual_seed(self.seed)
        order = list(
            _cycle_rows(len(self.labelled), self.sizes.labelled, self.steps, seed=2 * self.seed)
        )
        order_unlabelled = list(
            _cycle_rows(
                len(self.unlabelled), self.sizes.unlabelled, self.steps, seed=2 * self.seed + 1
            )
        )
        drawn = self.labelled.images.batches(order)
        drawn_unlabelled = self.unlabelled.images.batches(order_unlabelled)
        # At once: a copy to a GPU waits for all that it is at work on.
        rows_of_steps = torch.stack(order).to(device)
        rows_of_steps_unlabelled = torch.stack(order_unlabelled).to(device)
        for step in range(self.steps):
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
                self.targets.of_step(self.labelled.labels[rows], rows_unlabelled),
                mixup,
            )

    def _view(self, images: Tensor, augmentation: AugmentConfig, generator: Generator) -> Tensor:
        return augment(self.scale.to_unit(images, self.side), augmentation, generator)


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    objective: Objective,
    data: EpochData,
    *,
    precision: str,
    accumulation: int = 1,
    on_update: Callable[[], None] = lambda: None,
    on_step: Callable[[int], None] = lambda step: None,
) -> EpochResult:
    """One step for each batch of the data.

    The gradients of ``accumulation`` batches are averaged for one step of the optimiser, after
    which ``on_update`` is called.

    Raises:
        NonFiniteStep: on every rank alike, where the loss or the gradient is NaN or infinite.
    """
    device = data.labelled.images.device
    model.train()
    watch = GradientWatch(model.parameters(), device)
    losses = MeanLosses(device)
    data_wait_s = 0.0
    batches = data.batches()
    optimizer.zero_grad(set_to_none=True)
    for step in range(data.steps):
        started = time.perf_counter()
        batch = next(batches)
        data_wait_s += time.perf_counter() - started
        first_of_update = step - step % accumulation
        size_of_update = min(accumulation, data.steps - first_of_update)
        updates = step + 1 == first_of_update + size_of_update
        with nullcontext() if updates else without_gradient_exchange(model):
            with autocast(device, precision):
                output: EncoderOutput = model(batch.images)
            terms = batch.loss(objective, output)
            (carried_by_gradient(terms["total"]) / size_of_update).backward()
        watch.saw(batch.keys, terms["total"], batch.images, output.z, output.logits)
        if updates:
            watch.check(step)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            on_update()
        losses.add(terms)
        on_step(step)
    watch.finish()
    return EpochResult(losses.over_ranks(), data_wait_s)


def without_gradient_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Backward passes within add up on their rank; a model on one rank has nothing to exchange."""
    no_sync = getattr(model, "no_sync", None)
    context: AbstractContextManager[None] = nullcontext() if no_sync is None else no_sync()
    return context


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
    """Embeddings (n, E) and logits (n, C) of n slices, seen at ``side`` if given, in inference."""
    outputs: list[EncoderOutput] = []
    with forward_passes(model, images.device, precision) as forward:
        for batch in images.batches(torch.arange(len(images)).split(batch_size)):
            if len(batch) == 0:
                break
            outputs += forward(scale.standardise(scale.to_unit(batch, side)))
    if not outputs:  # a rank may hold no slice of a role
        probe = torch.zeros(1, 1, images.side, images.side, device=images.device)
        output = model(probe.contiguous(memory_format=torch.channels_last))
        return EncoderOutput(output.z[:0], output.logits[:0])
    return EncoderOutput(
        torch.cat([output.z for output in outputs]),
        torch.cat([output.logits for output in outputs]),
    )


@torch.no_grad()
def measure_batch_statistics(
    model: nn.Module,
    images: Images,
    *,
    augmentation: AugmentConfig,
    scale: PixelScale,
    batch_size: int,
    precision: str,
    side: int | None = None,
) -> None:
    """Set batch normalisation's means and variances to those of slices and of their views.

    Averaged weights have no statistics of their own (Izmailov et al. 2018, section 3.2), and
    running ones are of augmented slices alone. Measured afresh, as in Wu & Johnson 2021
    ("Rethinking 'Batch' in BatchNorm", section 3), on 2,048 of the slices at most, the same ones
    every time: half of each batch is seen as inference sees it, half augmented, which keeps the
    encoder ready for slices that differ from these. Where there is but one slice, which may have
    no variance, the model is left as it is.
    """
    order = torch.randperm(len(images), generator=Generator().manual_seed(0))
    chosen = order[:_SLICES_FOR_STATISTICS]
    if len(chosen) < 2:
        return
    # Every batch counts the same in the mean, so all are of one size, but for one slice; none is
    # a slice alone.
    num_batches = min(-(-len(chosen) // batch_size), len(chosen) // 2)
    batches = images.batches(chosen.tensor_split(num_batches))
    generator = Generator(images.device).manual_seed(0)

    def seen(batch: Tensor) -> Tensor:
        with autocast(images.device, "fp32"):  # as in training: a view's grid is no product
            unit = scale.to_unit(batch, side)
            as_they_are, augmented = unit.tensor_split(2)
            views = augment(augmented, augmentation, generator)
            return scale.standardise(torch.cat([as_they_are, views]))

    with autocast(images.device, precision):
        update_bn(map(seen, batches), model)


def _cycle_rows(num_rows: int, batch_size: int, steps: int, *, seed: int) -> Iterator[Tensor]:
    """``steps`` batches of row indices from one shuffled pass after the other."""
    generator = Generator().manual_seed(seed)  # on the CPU: the same order on every device
    assert num_rows > 0 or batch_size == 0, "a rank without slices cannot fill its batches"
    pool = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(pool) < batch_size:
            pool = torch.cat([pool, torch.randperm(num_rows, generator=generator)])
        yield pool[:batch_size]
        pool = pool[batch_size:]
