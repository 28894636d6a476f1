"""What this machine could do at best: work in FLOPs and bytes against its measured peaks."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_PRODUCT_SIDE = 2048  # of the square matrices whose product gives the arithmetic peak
_READ_BYTES = 2**28  # more than any cache holds
_ROUNDS = 5


@dataclass(frozen=True)
class Work:
    """What must be done at least, however it is programmed."""

    flops: float
    num_bytes: float  # to and from memory


@dataclass(frozen=True)
class Peaks:
    """What the fastest dense product, and reading memory, reach here with this many threads."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, work: Work) -> float:
        """The roofline (Williams et al. 2009): no program is faster than its slower resource.

        Bytes are taken to come from memory: what stays in a cache from one pass to the next may
        be read faster than this.
        """
        return max(work.flops / self.flops_per_s, work.num_bytes / self.bytes_per_s)

    def limit(self, work: Work) -> str:
        """Which resource that is: ``arithmetic`` or ``memory``."""
        by_arithmetic = work.flops / self.flops_per_s > work.num_bytes / self.bytes_per_s
        return "arithmetic" if by_arithmetic else "memory"


def measured_peaks(dtype: torch.dtype, device: torch.device) -> Peaks:
    """The median of five products of 2,048-square matrices, and of five sums over 256 MiB."""
    left = torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE, device=device).to(dtype)
    right = left.T.contiguous()
    product_s = _median_seconds(lambda: left @ right, device)
    much = torch.ones(_READ_BYTES // 4, device=device)
    read_s = _median_seconds(much.sum, device)
    return Peaks(2 * _PRODUCT_SIDE**3 / product_s, _READ_BYTES / read_s)


def training_work(model: nn.Module, images: Tensor, bytes_per_number: int) -> Work:
    """Of one forward and backward pass.

    Every layer without layers of its own reads its input and writes its output once, and moves
    twice as much in the backward pass.
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
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # the first one warms up
