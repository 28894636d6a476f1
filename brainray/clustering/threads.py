"""Share a rank's rows among CPU threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from brainray.clustering import shards

_MIN_ROWS_OF_THREAD = 1024


def shares(num_rows: int) -> list[slice]:
    """Split rows into one share per PyTorch thread, or fewer if there are few rows."""
    num_shares = max(min(torch.get_num_threads(), num_rows // _MIN_ROWS_OF_THREAD), 1)
    return list(shards.blocks(num_rows, max(-(-num_rows // num_shares), 1)))


class Threads:
    """Additional threads for functions that release the interpreter lock.

    PyTorch's own threads are not used, as they busy-wait for milliseconds after each operation and
    would take cores from the passes over a small shard.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def call(
        self, function: Callable[..., Any], arguments: Sequence[Sequence[object]]
    ) -> list[Any]:
        """Results of `function` for several lists of arguments, each in its own thread."""
        others = [self._pool.submit(function, *each) for each in arguments[1:]]
        first = [function(*each) for each in arguments[:1]]
        return first + [other.result() for other in others]


@contextmanager
def threads() -> Iterator[Threads]:
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield Threads(pool)
