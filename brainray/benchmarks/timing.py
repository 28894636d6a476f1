"""Timing of callables in alternation, so that other load on the machine affects all alike."""

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
from brainray.benchmarks.result import Measure
from brainray.log import log
from brainray.report.style import BLUE, GREY, ORANGE, SKY, new_figure

OURS = "brainray"
"""Name of the contestant that others are compared with."""
MIN_RANKS_SPEEDUP = 1.7  # of two ranks
MAX_RANKS_DIFFERENCE = 1e-6  # relative


@dataclass(frozen=True)
class Timed:
    """Time of a contestant and its last result."""

    seconds: float  # median over the rounds
    result: Any


def side_by_side(
    contestants: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: bool = True
) -> dict[str, Timed]:
    """Run all contestants once per round, in a different order each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, Any] = {}
    names = list(contestants)
    if warm_up:  # allocators, thread pools, kernels selected at the first call
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


def two_ranks_against_one(
    name: str, fit: Callable[..., Timed], *arguments: Any, num_bytes: int, criterion: str
) -> list[Measure]:
    """Speed-up of a fit by a second single-threaded rank, and the difference of its result.

    Args:
        name: of the case.
        fit: called on each rank with the ``arguments``; its result is what a fit optimises.
        arguments: sizes and seeds.
        num_bytes: size of the rows, of all ranks.
        criterion: name of the result.
    """
    log(f"two ranks of one thread against one, {name}")
    (one,) = dist.run_on_ranks(fit, 1, *arguments)
    two = dist.run_on_ranks(fit, 2, *arguments)
    return [
        Measure(
            f"{name}: two ranks against one",
            one.seconds / max(rank.seconds for rank in two),
            "x",
            at_least=MIN_RANKS_SPEEDUP,
        ),
        Measure(
            f"{name}: two ranks against one, reading the rows and no more",
            _ranks_reading_memory(num_bytes),
            "x",
        ),
        Measure(
            f"{name}: {criterion} on two ranks",
            abs(two[0].result / one.result - 1),
            at_most=MAX_RANKS_DIFFERENCE,
        ),
    ]


def _ranks_reading_memory(num_bytes: int) -> float:
    """Speed-up of reading memory with two single-threaded ranks instead of one: the gain that a
    second rank on this machine can bring to memory-bound work.
    """
    (alone,) = dist.run_on_ranks(_seconds_to_read, 1, num_bytes)
    return float(alone / max(dist.run_on_ranks(_seconds_to_read, 2, num_bytes // 2)))


def _seconds_to_read(num_bytes: int) -> float:
    return timed_on_rank(torch.ones(num_bytes // 4).sum, rounds=9).seconds


def timed_on_rank(work: Callable[[], Any], *, rounds: int) -> Timed:
    """Time a rank's part of some work after a warm-up, each time starting with all ranks ready."""
    result = work()
    seconds = []
    for _ in range(rounds):
        dist.sum_across_ranks(torch.zeros(1))
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return Timed(statistics.median(seconds), result)


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Restrict OpenCV to the calling thread, as in Ray tasks."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def relative_times(milliseconds: Mapping[str, Mapping[str, float]]) -> Figure:
    """Times of the contestants of each case relative to ours, on a logarithmic axis.

    ``milliseconds`` contains up to four contestants by name for each case, among them `OURS`.
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
