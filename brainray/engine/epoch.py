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

from brainray import dist
from brainray.config import AugmentConfig
from brainray.engine.finite import GradientWatch, carried_by_gradient
from brainray.engine.forward import autocast, forward_passes
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


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    objective: Objective,
    labelled: SliceShard,
    unlabelled: SliceShard,
    targets: EpochTargets,
    *,
    sizes: StepSizes,
    steps: int,
    scale: PixelScale,
    augmentation: AugmentConfig,
    augmentation_unlabelled: AugmentConfig,
    precision: str,
    seed: int,
    side: int | None = None,
    mixup_alpha: float = 0.0,
    accumulation: int = 1,
    on_update: Callable[[], None] = lambda: None,
    on_step: Callable[[int], None] = lambda step: None,
) -> EpochResult:
    """Train on ``steps`` batches, the same number on every rank.

    Whichever of labelled and unlabelled slices are fewer cycle. Order and augmentation follow
    from ``seed`` alone, which must differ between epochs and ranks; slices are resized to ``side``
    where one is given, and labelled ones mixed where alpha is above 0. The gradients of
    ``accumulation`` batches are averaged for one step of the optimiser, after which ``on_update``
    is called.

    Raises:
        NonFiniteStep: on every rank alike, where the loss or the gradient is NaN or infinite.
    """
    device = labelled.images.device
    model.train()
    generator = Generator(device).manual_seed(seed)
    order = list(_cycle_rows(len(labelled), sizes.labelled, steps, seed=2 * seed))
    order_unlabelled = list(
        _cycle_rows(len(unlabelled), sizes.unlabelled, steps, seed=2 * seed + 1)
    )
    kinds = (
        (labelled.images.batches(order), augmentation),
        (unlabelled.images.batches(order_unlabelled), augmentation_unlabelled),
    )
    watch = GradientWatch(model.parameters(), device)
    sums: dict[str, Tensor] = {}
    data_wait_s = 0.0
    optimizer.zero_grad(set_to_none=True)
    for step in range(steps):
        started = time.perf_counter()
        views = [
            augment(scale.to_unit(next(drawn), side), augmentation_of, generator)
            for drawn, augmentation_of in kinds
        ]
        mixup = None
        if mixup_alpha:
            mixup = Mixup.draw(len(views[0]), mixup_alpha, seed + step, device)
            views[0] = mixup.images(views[0])
        images = scale.standardise(torch.cat(views))
        data_wait_s += time.perf_counter() - started
        rows, rows_unlabelled = order[step].to(device), order_unlabelled[step].to(device)
        first_of_update = step - step % accumulation
        size_of_update = min(accumulation, steps - first_of_update)
        updates = step + 1 == first_of_update + size_of_update
        with nullcontext() if updates else without_gradient_exchange(model):
            with autocast(device, precision):
                output: EncoderOutput = model(images)
            outputs = StepOutputs(
                labelled=EncoderOutput(output.z[: len(rows)], output.logits[: len(rows)]),
                unlabelled=EncoderOutput(output.z[len(rows) :], output.logits[len(rows) :]),
            )
            wanted = targets.of_step(labelled.labels[rows], rows_unlabelled)
            terms = (
                mixup.loss(objective, outputs, wanted) if mixup else objective.loss(outputs, wanted)
            )
            (carried_by_gradient(terms["total"]) / size_of_update).backward()
        keys = torch.cat([labelled.keys[rows], unlabelled.keys[rows_unlabelled]])
        watch.saw(keys, terms["total"], images, output.z, output.logits)
        if updates:
            watch.check(step)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            on_update()
        for name, value in terms.items():
            # Summed on the device: reading a value every step would stop the queue.
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach()
        on_step(step)
    watch.finish()
    totals = dist.sum_across_ranks(torch.stack(list(sums.values())).double())
    means = (totals / (steps * dist.world_size())).tolist()
    return EpochResult(dict(zip(sums, means, strict=True)), data_wait_s)


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
