"""What counts against the soak benchmark: hangs, failures, growth, lost epochs, other weights."""

import random
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from brainray import layout
from brainray.benchmarks import soak
from brainray.storage import Folder


@dataclass
class _Submission:
    """A process that has ended with a code, or hangs; one of its processes may be killed."""

    code: int | None
    is_killed: bool = False
    pid: int = 0

    def wait(self, timeout: float) -> int:
        if self.code is None:
            raise subprocess.TimeoutExpired("train", timeout)
        return self.code


class _Idle:
    """A cluster of which nothing is used."""

    def start(self) -> None:
        pass


@pytest.mark.parametrize(
    ("first", "num_failed", "num_hung"),
    [
        (_Submission(1), 1, 0),
        (_Submission(1, is_killed=True), 0, 0),
        (_Submission(None), 0, 1),
        (_Submission(None, is_killed=True), 0, 1),
    ],
)
def test_a_submission_that_hangs_or_fails_without_a_kill_is_counted(
    first: _Submission, num_failed: int, num_hung: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    submissions = iter([first, _Submission(0)])

    def kill(_: Any, driver: Any, *rest: Any) -> None:
        killed: Counter[str] = rest[-1]
        killed["driver"] += driver.is_killed

    monkeypatch.setattr(soak, "_job", lambda *_: next(submissions))
    monkeypatch.setattr(soak, "_kill_at_random", kill)
    monkeypatch.setattr(soak, "kill_with_children", lambda _: None)
    cluster: Any = _Idle()
    over = soak.Scale(minutes=0.0, kill_every_s=(60.0, 90.0), num_epochs=1)  # one run is awaited
    soaked = soak._soak(cluster, Path("soak.yaml"), over, random.Random(0))
    assert (soaked.num_failed, soaked.num_hung) == (num_failed, num_hung)
    assert soaked.finished == ["soak-1"]
    assert soaked.killed.total() == first.is_killed


def test_growth_is_that_of_the_last_third_of_a_run_over_the_middle_one() -> None:
    sizes = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    growth = soak._Growth([{"bytes": size, "descriptors": 10.0} for size in sizes])
    assert growth.ratios() == (2.0, 1.0)


def test_epochs_that_a_log_lacks_or_repeats_are_counted(tmp_path: Path) -> None:
    run = Folder(tmp_path) / layout.RUNS / "soak-1"
    run.write_json_lines(layout.METRICS, [{"epoch": epoch} for epoch in (1.0, 2.0, 2.0, 4.0)])
    assert soak._num_missing(tmp_path, "soak-1", num_epochs=4) == 2


def test_weights_are_the_same_only_if_all_of_them_are() -> None:
    weights = {"first": torch.zeros(2), "last": torch.ones(2)}
    assert soak._equal(weights, {name: value.clone() for name, value in weights.items()})
    for name in weights:
        assert not soak._equal(weights, weights | {name: torch.full((2,), 7.0)})
