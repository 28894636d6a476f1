"""A rank's rows, shared out among its processor threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from brainray.clustering import shards

_MIN_ROWS_OF_THREAD = 1024


def shares(num_rows: int) -> list[slice]:
    """As many shares of rows as PyTorch may use threads, fewer where there are few rows."""
    num_shares = max(min(torch.get_num_threads(), num_rows // _MIN_ROWS_OF_THREAD), 1)
    return list(shards.blocks(num_rows, max(-(-num_rows // num_shares), 1)))


class Threads:
    """Threads beside the caller's for functions that release the interpreter's lock.

    They are not PyTorch's, which wait busily for milliseconds after each operation of theirs, and
    so take a core from the passes over a small shard.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def call(
        self, function: Callable[..., Any], arguments: Sequence[Sequence[object]]
    ) -> list[Any]:
        """What `function` returns for each of several lists of arguments: a thread each."""
        others = [self._pool.submit(function, *each) for each in arguments[1:]]
        first = [function(*each) for each in arguments[:1]]
        return first + [other.result() for other in others]


@contextmanager
def threads() -> Iterator[Threads]:
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield Threads(pool)
