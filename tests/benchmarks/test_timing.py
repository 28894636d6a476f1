"""Contestants are timed alike."""

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from brainray import dist
from brainray.benchmarks import timing
from brainray.benchmarks.timing import (
    OURS,
    Timed,
    relative_times,
    side_by_side,
    two_ranks_against_one,
)


def test_every_contestant_goes_first_in_one_round_and_its_median_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of all that other tests have imported
    clock, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    seconds = {"a": iter([9.0, 1.0, 30.0, 2.0]), "b": iter([9.0, 5.0, 5.0, 5.0])}

    def run(name: str) -> str:
        order.append(name)
        clock[0] += next(seconds[name])
        return f"result of {name}"

    found = side_by_side({name: partial(run, name) for name in "ab"}, rounds=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert found == {"a": Timed(2.0, "result of a"), "b": Timed(5.0, "result of b")}


def test_two_ranks_are_as_fast_as_the_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_on_ranks(_: Callable[..., Any], num_ranks: int, *__: Any) -> list[Timed]:
        both = [Timed(5.0, 101.0), Timed(8.0, 101.0)]
        return [Timed(10.0, 100.0)] if num_ranks == 1 else both

    monkeypatch.setattr(dist, "run_on_ranks", run_on_ranks)
    monkeypatch.setattr(timing, "_ranks_reading_memory", lambda _: 1.5)
    speedup, memory, difference = two_ranks_against_one(
        "fit", lambda: Timed(0, 0), num_bytes=8, criterion="inertia"
    )
    assert (speedup.value, speedup.verdict) == (1.25, "missed")
    assert (memory.value, memory.verdict) == (1.5, "")
    assert difference.value == pytest.approx(0.01)
    assert difference.verdict == "missed"


def test_times_are_drawn_relative_to_ours() -> None:
    figure = relative_times({"one": {OURS: 2.0, "peer": 5.0}, "two": {OURS: 4.0, "peer": 2.0}})
    widths = [bar.get_width() for bar in figure.axes[0].patches]  # type: ignore[attr-defined]
    assert widths == [1.0, 2.5, 1.0, 0.5]
