"""Detection of non-finite losses and gradients, at the same step on every rank.

A non-finite loss makes its gradient NaN (`nan_gradient_unless_finite`), and gradient averaging
passes that on to all ranks, so no extra collective is needed. Whether the gradient is finite is
read immediately on a CPU. Other devices copy it asynchronously, and it is read some updates later,
the same number on every rank.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brainray import dist
from brainray.engine.shard import ids_of_keys
from brainray.errors import DivergenceError

_MAX_NAMED = 8  # slices in an error
_LAG = 2  # updates by which the check lags behind on devices other than the CPU


class NonFiniteStep(Exception):
    """A step's loss or gradient is not finite; raised on every rank.

    ``culprits`` (n,) int64 are keys of this rank's slices with non-finite values, and ``batch`` the
    keys of all of this rank's slices in the step.
    """

    def __init__(self, step: int, culprits: Tensor, batch: Tensor) -> None:
        super().__init__(f"step {step}")
        self.step = step
        self.culprits = culprits
        self.batch = batch


@contextmanager
def naming_slices(
    sample_ids: Callable[[], list[str]], *, where: str, num_steps: int, remedy: str
) -> Iterator[None]:
    """Turn a `NonFiniteStep` into an error for the user that names the slices concerned.

    Collective if the step is raised, as it is on every rank. ``sample_ids`` gives those of all
    slices.

    Raises:
        DivergenceError: the same on every rank.
    """
    try:
        yield
    except NonFiniteStep as stop:
        culprits = dist.gather_rows(stop.culprits)
        named = culprits if len(culprits) else dist.gather_rows(stop.batch)
        raise DivergenceError(
            f"{where}, step {stop.step + 1} of {num_steps}: the loss or its gradient is NaN or "
            f"infinite for {name_slices(sample_ids(), named)}: {remedy}"
        ) from None


def name_slices(sample_ids: list[str], keys: Tensor) -> str:
    """Those of the slices that have these keys (n,), for error messages."""
    found = sorted(set(ids_of_keys(sample_ids, keys)))
    more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
    return f"sample_id {', '.join(found[:_MAX_NAMED])}{more}"


def nan_gradient_unless_finite(loss: Tensor) -> Tensor:
    """The scalar loss, with a gradient of NaN if it is not finite; otherwise bitwise unchanged."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)


@dataclass(frozen=True)
class _Batch:
    keys: Tensor  # (B,) int64
    finite: Tensor  # (T, B) bool: whether each row of each watched tensor is finite
    loss_is_finite: Tensor  # () bool

    def culprits(self) -> Tensor:
        """Bad rows of the first tensor with any; later layers may have spread them to others."""
        for finite in self.finite:
            if not finite.all():
                return self.keys[~finite]
        return self.keys[:0] if self.loss_is_finite else self.keys


@dataclass(frozen=True)
class _Update:
    step: int
    finite: Tensor  # () bool on the CPU, once `copied` has happened
    copied: torch.cuda.Event | None
    batches: list[_Batch]


class GradientWatch:
    """Checks the gradient of every update before or, on a GPU, soon after it is applied."""

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._parameters = list(parameters)
        self._lag = 0 if device.type == "cpu" else _LAG
        self._batches: list[_Batch] = []
        self._updates: deque[_Update] = deque()

    def saw(self, keys: Tensor, loss: Tensor, *values: Tensor) -> None:
        """Record a batch: keys (B,), loss, and tensors (B, ...) in the order of computation."""
        # A sum needs one pass and is finite if all values are; a mask of all values would cost 1 %
        # of a step. A sum that overflows belongs to a diverged row; it matters only after a bad
        # gradient.
        sums = torch.stack([value.detach().flatten(1).sum(dim=1).float() for value in values])
        finite = torch.isfinite(sums)
        self._batches.append(_Batch(keys, finite, torch.isfinite(loss.detach())))

    def check(self, step: int) -> None:
        """Check an update; to be called once its gradients are computed.

        Raises:
            NonFiniteStep: for this update or one shortly before.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        finite = torch.isfinite(nn.utils.get_total_norm(gradients))
        copied = None
        if finite.is_cuda:
            on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
            on_host.copy_(finite, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            finite = on_host
        self._updates.append(_Update(step, finite, copied, self._batches))
        self._batches = []
        while len(self._updates) > self._lag:
            self._read(self._updates.popleft())

    def finish(self) -> None:
        """Check all pending updates; raises like ``check``."""
        while self._updates:
            self._read(self._updates.popleft())

    def _read(self, update: _Update) -> None:
        if update.copied is not None:
            update.copied.synchronize()
        if not update.finite:
            raise NonFiniteStep(
                update.step,
                torch.cat([batch.culprits() for batch in update.batches]),
                torch.cat([batch.keys for batch in update.batches]),
            )
