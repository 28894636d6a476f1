"""Submissions that hang, or fail by themselves, count against the soak benchmark."""

import random
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from brainray.benchmarks import soak


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
