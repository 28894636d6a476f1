"""What a sweep costs per trial does not include what it does once at its end."""

import os
import time
from pathlib import Path

import pytest

from brainray import layout
from brainray.benchmarks import sweep


def test_the_clock_of_trials_ends_when_the_last_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, begun, complete in [("tuned-0", 103, 110), ("tuned-1", 112, 120), ("other", 90, 200)]:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        for file, when in [(layout.RUN, begun), (layout.SUMMARY, complete)]:
            (folder / file).touch()
            os.utime(folder / file, (when, when))
    monkeypatch.setattr(time, "time", lambda: 150.0)
    spent = sweep._durations(tmp_path, "tuned-*", started=100.0)
    assert (spent.start_s, spent.runs_s, spent.end_s) == (3.0, 17.0, 30.0)
    assert spent.whole_s == 50.0
