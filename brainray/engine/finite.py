"""Numbers that are no longer finite: every rank stops at the same step, and no device waits.

A loss that is not finite makes its gradient NaN (`carried_by_gradient`), and the ranks' average of
the gradients takes that to all of them: no collective of its own is needed. Whether the gradient
was finite is read at once on a CPU; on other devices it is copied while they go on, and read some
updates later, the same number on every rank.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LAG = 2  # updates that a device other than the CPU may be ahead of what is read


class NonFiniteStep(Exception):
    """A step's loss or gradient is not finite; raised on every rank alike.

    ``culprits`` (n,) int64 are keys of this rank's slices whose own numbers are not finite, and
    ``batch`` those of all slices that this rank has brought to the step.
    """

    def __init__(self, step: int, culprits: Tensor, batch: Tensor) -> None:
        super().__init__(f"step {step}")
        self.step = step
        self.culprits = culprits
        self.batch = batch


def carried_by_gradient(loss: Tensor) -> Tensor:
    """The scalar loss, with a gradient of NaN where it is not finite; else bit by bit the same."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)


@dataclass(frozen=True)
class _Batch:
    keys: Tensor  # (B,) int64
    finite: Tensor  # (T, B) bool: of each watched tensor, whether the row is finite
    loss_is_finite: Tensor  # () bool

    def culprits(self) -> Tensor:
        """Rows of the first tensor that has bad ones: a layer may spread one to all that follow."""
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
    """Looks at the gradient of every update before, or on a GPU soon after, it is applied."""

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._parameters = list(parameters)
        self._lag = 0 if device.type == "cpu" else _LAG
        self._batches: list[_Batch] = []
        self._updates: deque[_Update] = deque()

    def saw(self, keys: Tensor, loss: Tensor, *values: Tensor) -> None:
        """Remember a batch: keys (B,), its loss, and tensors (B, ...) in the order of computing."""
        # A sum is finite where all values are, and one pass; a mask of the values costs a hundredth
        # of a step. A sum that overflows is a diverged row's: it is asked for after a bad gradient.
        sums = torch.stack([value.detach().flatten(1).sum(dim=1).float() for value in values])
        finite = torch.isfinite(sums)
        self._batches.append(_Batch(keys, finite, torch.isfinite(loss.detach())))

    def check(self, step: int) -> None:
        """To be called with an update's gradients in place.

        Raises:
            NonFiniteStep: of this update, or of one shortly before.
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
        """Read what has not been read yet; raises as ``check`` does."""
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
