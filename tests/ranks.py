"""Two ranks for tests of what must not depend on the number of ranks."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

OnRanks = Callable[..., list[Any]]
"""Calls a module's top-level function with the given arguments on every rank; returns what they
return, in rank order.
"""


@contextmanager
def two_ranks(folder: Path) -> Iterator[OnRanks]:
    """Two processes of one gloo group, for many calls: starting them takes seconds.

    A rank that fails alone leaves the other in a collective for a minute.
    """
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                ProcessPoolExecutor(
                    1, multiprocessing.get_context("spawn"), _join, (f"file://{folder}/group", rank)
                )
            )
            for rank in range(2)
        ]

        def on_ranks(work: Callable[..., Any], *arguments: Any) -> list[Any]:
            running = [rank.submit(work, *arguments) for rank in ranks]
            return [outcome.result() for outcome in running]

        yield on_ranks


def _join(rendezvous: str, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(minutes=1)
    )
