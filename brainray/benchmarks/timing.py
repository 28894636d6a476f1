"""Callables side by side: in turns, so that what else the machine does hits all alike."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import torch
from matplotlib.figure import Figure

from brainray import dist
from brainray.report.style import BLUE, GREY, ORANGE, SKY, new_figure

OURS = "brainray"
"""Name of the contestant that the others are compared with."""


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


def ranks_reading_memory(num_bytes: int) -> float:
    """How many times faster two ranks of one thread read so many bytes together than one does:
    what work that memory alone limits would gain from a second rank of this machine.
    """
    (alone,) = dist.run_on_ranks(_seconds_to_read, 1, num_bytes)
    return float(alone / max(dist.run_on_ranks(_seconds_to_read, 2, num_bytes // 2)))


def _seconds_to_read(num_bytes: int) -> float:
    return timed_on_rank(torch.ones(num_bytes // 4).sum, rounds=9).seconds


def timed_on_rank(work: Callable[[], Any], *, rounds: int) -> Timed:
    """A rank's part of some work, warmed up, each time from when all ranks are ready."""
    result = work()
    seconds = []
    for _ in range(rounds):
        dist.sum_across_ranks(torch.zeros(1))
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return Timed(statistics.median(seconds), result)


@contextmanager
def one_thread() -> Iterator[None]:
    """OpenCV on the calling thread alone, as in Ray's tasks."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def relative_times(milliseconds: Mapping[str, Mapping[str, float]]) -> Figure:
    """For each case, the contestants' times relative to ours, on a logarithmic axis.

    ``milliseconds`` holds at most four contestants by name for each case, `OURS` among them.
    """
    figure = new_figure(8.0, 1.1 * len(milliseconds) + 1.0)
    axes = figure.subplots()
    for row, found in enumerate(milliseconds.values()):
        bars = zip((BLUE, ORANGE, GREY, SKY), found.items(), strict=False)
        for place, (colour, (name, value)) in enumerate(bars):
            label = name if row == 0 else None
            axes.barh(
                row + 0.2 * place, value / found[OURS], height=0.18, color=colour, label=label
            )
    axes.set_yticks([row + 0.3 for row in range(len(milliseconds))], list(milliseconds))
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel(f"time relative to {OURS}, same start and iterations")
    axes.legend()
    return figure
