"""Forward passes: in which precision, and in inference mode on which threads."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SLICES_PER_THREAD = 64


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """bf16 autocast, or none for ``fp32``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def forward_passes(
    model: nn.Module, device: torch.device, precision: str
) -> Iterator[Callable[[Tensor], list[Any]]]:
    """What a model makes of a batch (B, ...), in parts whose rows follow each other.

    On CPUs every thread takes slices of its own through all layers: on two cores 10 to 20 % faster
    than all threads together at one layer after the other.
    """
    model.eval()

    @torch.inference_mode()
    def forward(images: Tensor) -> Any:
        with autocast(device, precision):
            return model(images)

    num_threads = torch.get_num_threads()
    if device.type != "cpu" or num_threads == 1:
        yield lambda images: [forward(images)]
        return
    try:
        with ThreadPoolExecutor(num_threads, "forward", torch.set_num_threads, (1,)) as pool:
            yield lambda images: list(pool.map(forward, images.split(_SLICES_PER_THREAD)))
    finally:
        torch.set_num_threads(num_threads)  # what new threads begin with is the process's
