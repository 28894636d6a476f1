"""Roofline model of this machine: work in FLOPs and bytes against measured peaks."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from brainray.benchmarks.timing import wait

_PRODUCT_SIDE = 2048  # of the square matrices multiplied to measure the arithmetic peak
_READ_BYTES = 2**28  # larger than any cache
_ROUNDS = 5


@dataclass(frozen=True)
class Work:
    """Minimum work of a computation, regardless of its implementation."""

    flops: float
    num_bytes: float  # to and from memory


@dataclass(frozen=True)
class Peaks:
    """Peaks of dense matrix products and of reading memory with the current number of threads."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, work: Work) -> float:
        """Lower bound of the time by the roofline model (Williams et al. 2009).

        All bytes are assumed to come from memory; data that stay in a cache between passes may be
        read faster.
        """
        return max(work.flops / self.flops_per_s, work.num_bytes / self.bytes_per_s)

    def limit(self, work: Work) -> str:
        """The limiting resource: ``arithmetic`` or ``memory``."""
        by_arithmetic = work.flops / self.flops_per_s > work.num_bytes / self.bytes_per_s
        return "arithmetic" if by_arithmetic else "memory"


def measured_peaks(dtype: torch.dtype, device: torch.device) -> Peaks:
    """Medians of five products of 2,048 x 2,048 matrices and of five sums over 256 MiB."""
    left = torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE, device=device).to(dtype)
    right = left.T.contiguous()
    product_s = _median_seconds(lambda: left @ right, device)
    much = torch.ones(_READ_BYTES // 4, device=device)
    read_s = _median_seconds(much.sum, device)
    return Peaks(2 * _PRODUCT_SIDE**3 / product_s, _READ_BYTES / read_s)


def training_work(model: nn.Module, images: Tensor, bytes_per_number: int) -> Work:
    """Work of a forward and backward pass.

    Every leaf layer reads its input and writes its output once, and moves twice as much in the
    backward pass.
    """
    moved = 0

    def count(layer: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal moved
        moved += sum(each.numel() for each in (*inputs, output) if isinstance(each, Tensor))

    layers = [layer for layer in model.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with FlopCounterMode(display=False) as counter:
            model(images).logits.sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return Work(counter.get_total_flops(), 3.0 * moved * bytes_per_number)


def _median_seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    seconds = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # without the warm-up
