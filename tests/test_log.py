"""Lines of progress."""

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
