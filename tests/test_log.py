"""Lines of progress, and the times of stages."""

import itertools

import pytest

from brainray import log


def test_progress_is_logged_every_ten_seconds_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count(0.0, 4.0)
    monkeypatch.setattr("brainray.log.time.monotonic", lambda: next(seconds))
    progress = log.ProgressLines("decoded", "files")

    for done in (0, 500, 1000, 1500, 2000):
        progress.update(done, 2000)

    assert capsys.readouterr().out.splitlines() == [
        "decoded 1,000 of 2,000 files, 12 s left",
        "decoded 2,000 of 2,000 files, 0 s left",
    ]


def test_a_line_of_progress_keeps_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    log.log("tracking at http://user:hunter2@mlflow:5000")

    assert "hunter2" not in capsys.readouterr().out


def test_a_lap_has_the_time_since_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 107.0, 108.0])
    monkeypatch.setattr("brainray.log.time.monotonic", lambda: next(clock))
    stopwatch = log.Stopwatch()
    stopwatch.lap("first")
    stopwatch.lap("second")
    assert list(stopwatch.seconds.items()) == [("first", 2.0), ("second", 5.0)]
    assert stopwatch.total == 8.0
