"""The training loop over the steps of one epoch, with or without labels."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from brainray import dist
from brainray.engine.finite import GradientWatch, nan_gradient_unless_finite
from brainray.engine.forward import autocast
from brainray.log import ProgressLines

_HEARTBEAT_S = 30.0


class Batch(Protocol):
    """Slices of one step on one rank."""

    @property
    def images(self) -> Tensor:
        """(B, 1, H, W) float32, as the model takes them."""
        ...

    @property
    def keys(self) -> Tensor:
        """(B,) int64 keys of the slices, with which `NonFiniteStep` names them."""
        ...

    def loss(self, output: Any) -> dict[str, Tensor]:
        """Scalar terms for the model's output, among them their ``total``."""
        ...


class Epoch(Protocol):
    """What one rank learns from in one epoch."""

    @property
    def num_steps(self) -> int:
        """Number of batches, the same on every rank."""
        ...

    def batches(self) -> Iterator[Batch]:
        """Yield one batch per step."""
        ...


@dataclass(frozen=True)
class EpochResult:
    """Result of one epoch of training."""

    losses: dict[str, float]  # mean of each term over all steps and ranks
    data_wait_s: float  # until batches were ready; on a CPU mostly their augmentation


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    epoch: Epoch,
    *,
    precision: str,
    accumulation: int = 1,
    on_update: Callable[[int], None] = lambda num_batches: None,
    on_step: Callable[[int], None] = lambda step: None,
) -> EpochResult:
    """Train on every batch (collective).

    Args:
        model: possibly wrapped in DDP; its outputs are tuples of tensors (B, ...).
        optimizer: of its parameters.
        scheduler: stepped with the optimiser.
        epoch: this rank's batches, with their loss.
        precision: ``bf16`` or ``fp32``.
        accumulation: number of batches whose gradients are averaged for one step of the optimiser.
        on_update: called after each step of the optimiser with its number of batches; the last one
            of an epoch may have fewer than ``accumulation``.
        on_step: called after each batch with its number, from 0.

    Raises:
        NonFiniteStep: on every rank, if the loss or the gradient is NaN or infinite.
    """
    device = next(model.parameters()).device
    model.train()
    watch = GradientWatch(model.parameters(), device)
    losses: list[dict[str, Tensor]] = []
    data_wait_s = 0.0
    batches = epoch.batches()
    optimizer.zero_grad(set_to_none=True)
    for step in range(epoch.num_steps):
        started = time.perf_counter()
        batch = next(batches)
        data_wait_s += time.perf_counter() - started
        first_of_update = step - step % accumulation
        size_of_update = min(accumulation, epoch.num_steps - first_of_update)
        updates = step + 1 == first_of_update + size_of_update
        with nullcontext() if updates else _without_gradient_exchange(model):
            with autocast(device, precision):
                output = model(batch.images)
            terms = batch.loss(output)
            (nan_gradient_unless_finite(terms["total"]) / size_of_update).backward()
        watch.saw(batch.keys, terms["total"], batch.images, *output)
        if updates:
            watch.check(step)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            on_update(size_of_update)
        losses.append({name: value.detach() for name, value in terms.items()})
        on_step(step)
    watch.finish()
    return EpochResult(_mean_losses(losses), data_wait_s)


def heartbeat(name: str, num_steps: int) -> Callable[[int], None]:
    """An ``on_step`` with which the first rank logs the progress of a long epoch, but not its end,
    which has a line of its own.
    """
    progress = ProgressLines(f"{name}: trained", "steps", every_s=_HEARTBEAT_S)

    def on_step(step: int) -> None:
        if dist.rank() == 0 and step + 1 < num_steps:
            progress.update(step + 1, num_steps)

    return on_step


def _without_gradient_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Keep gradients on each rank for now; does nothing for a single rank."""
    no_sync = getattr(model, "no_sync", None)
    context: AbstractContextManager[None] = nullcontext() if no_sync is None else no_sync()
    return context


def _mean_losses(steps: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Mean of each term over all ranks' equally many steps (collective).

    They are read from their device only here, since reading one per step would stall its queue.
    """
    values = torch.stack([torch.stack(list(terms.values())) for terms in steps])
    means = dist.sum_across_ranks(values.double().mean(dim=0)) / dist.world_size()
    return dict(zip(steps[0], means.tolist(), strict=True))
