"""Callables side by side: in turns, so that what else the machine does hits all alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timed:
    """What one contestant took, and what it returned last."""

    seconds: float  # median over the rounds
    result: Any


def side_by_side(
    contestants: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: bool = True
) -> dict[str, Timed]:
    """Run all contestants once a round, each round in another order."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, Any] = {}
    names = list(contestants)
    if warm_up:  # allocators, thread pools, kernels chosen at the first call
        for name in names:
            contestants[name]()
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            started = time.perf_counter()
            results[name] = contestants[name]()
            seconds[name].append(time.perf_counter() - started)
    return {name: Timed(statistics.median(seconds[name]), results[name]) for name in names}
