"""Forward passes: precision, and threads in inference mode."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

_MAX_PIXELS_AT_ONCE = 2**18  # per thread of a CPU; the activations of more would not fit its cache


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """bf16 autocast, or none for ``fp32``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def infer(
    model: nn.Module, batches: Iterable[Tensor], device: torch.device, precision: str
) -> list[Any]:
    """The model's outputs for batches (B, ...) in inference mode, as parts in row order.

    On CPUs every thread takes its own rows through all layers, which is faster than all threads
    working on one layer at a time (measured by `jobs/benchmark.py predict`).
    """
    model.eval()

    @torch.inference_mode()
    def forward(images: Tensor) -> Any:
        with autocast(device, precision):
            return model(images)

    if device.type != "cpu":
        return [forward(images) for images in batches]
    num_threads = torch.get_num_threads()

    def parts(images: Tensor) -> Sequence[Tensor]:
        at_most = max(_MAX_PIXELS_AT_ONCE // images.shape[1:].numel(), 1)
        return images.split(min(at_most, max(-(-len(images) // num_threads), 1)))

    if num_threads == 1:
        return [forward(part) for images in batches for part in parts(images)]

    def side_by_side(images: Tensor) -> list[Any]:
        if len(images) < num_threads:  # all threads share each layer
            return [forward(images)]
        return list(pool.map(forward, parts(images)))

    try:
        with ThreadPoolExecutor(num_threads, "forward", torch.set_num_threads, (1,)) as pool:
            return [part for images in batches for part in side_by_side(images)]
    finally:
        torch.set_num_threads(num_threads)  # the setting that new threads inherit
