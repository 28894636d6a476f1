"""Run a function on several ranks of one machine, for tests of what must not depend on them."""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.multiprocessing.spawn import spawn

_TIMEOUT_S = 60


def run_on_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Results of `fn(*args)` on each of `world_size` ranks of a gloo group, in rank order.

    `fn` and its arguments are pickled: `fn` is a module's top-level function, and asks
    `brainray.dist` for its rank. Ranks are new processes, each of which imports torch: bundle
    checks. An exception on any rank is raised here, with that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as directory:
        spawn(_run_rank, (fn, world_size, directory, args), nprocs=world_size)
        return [
            torch.load(_result_path(directory, rank), weights_only=False)
            for rank in range(world_size)
        ]


def _run_rank(
    rank: int, fn: Callable[..., Any], world_size: int, directory: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    try:
        torch.save(fn(*args), _result_path(directory, rank))
    finally:
        torch_dist.destroy_process_group()


def _result_path(directory: str, rank: int) -> Path:
    return Path(directory) / f"rank{rank}.pt"
