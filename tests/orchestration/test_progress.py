"""What a user sees of training while it runs."""

import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from brainray import layout
from brainray.config import SelfSupervisionConfig, TrainConfig
from brainray.orchestration import progress
from brainray.orchestration.progress import (
    Follower,
    RoomFollower,
    Watcher,
    pretraining_line,
    time_left,
    training_line,
)
from brainray.orchestration.resources import WorkerResources
from brainray.schema import History
from brainray.storage import Folder


class Flaky(Watcher):
    """Its storage is unavailable in the first two polls."""

    num_polls = 0

    def poll(self) -> None:
        self.num_polls += 1
        if self.num_polls <= 2:
            raise OSError("storage is away")


def test_a_failed_poll_is_logged_once_and_the_next_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "POLL_S", 0.05)
    with Flaky() as flaky:
        deadline = time.monotonic() + 20
        while flaky.num_polls < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    lines = capsys.readouterr().out.splitlines()
    assert flaky.num_polls >= 4  # the last of them at the end of the block
    assert lines == ["progress is temporarily unavailable: OSError: storage is away"]


def test_too_little_room_is_said_once_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, node = 0.0, {"CPU": 2.0}
    nodes = [node, node]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(progress, "alive_nodes", lambda: nodes)
    fixed = RoomFollower(WorkerResources(2, 2, gpus_per_worker=0, room=2))
    elastic = RoomFollower(WorkerResources(2, 2, gpus_per_worker=0, room=2, min_workers=1))

    def lines(seconds: int) -> list[str]:
        nonlocal now
        for _ in range(seconds):
            fixed.poll()
            elastic.poll()
            now += 1
        return capsys.readouterr().out.splitlines()

    assert lines(60) == []
    nodes.remove(node)
    (line,) = lines(60)
    assert line.startswith("waiting for nodes (1 alive): 2 workers with 2 CPU(s) each do not fit: ")
    assert "has room for 1; training goes on when they join" in line
    assert len(lines(180)) == 3
    nodes.append(node)
    assert lines(60) == []


def test_time_left_counts_pixels() -> None:
    growing = TrainConfig(image_size=128, start_image_size=64, growth_epochs=2, num_epochs=4)
    first = {"epoch": 1.0, "train/image_size": 64.0, "time/epoch_s": 10.0}
    assert time_left(first, growing) == timedelta(seconds=round(10 * (96**2 + 2 * 128**2) / 64**2))
    last = {"epoch": 4.0, "train/image_size": 128.0, "time/epoch_s": 40.0}
    assert time_left(last, growing) == timedelta(0)


def test_metrics_are_told_once_each_and_sent_whenever_others_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path)
    sent: list[History] = []
    rows = [{"epoch": float(epoch)} for epoch in (1, 2, 3)]
    follower = Follower(folder, lambda metrics: f"epoch {metrics['epoch']:.0f}", sent.append)
    for num_rows in (0, 2, 2, 3, 1, 0):  # fewer: workers restarted from an earlier checkpoint
        folder.write_json_lines(layout.METRICS, rows[:num_rows])
        follower.poll()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["epoch 1", "epoch 2", "epoch 3", "restarted after epoch 1", "restarted"]
    assert sent == [rows[:2], rows, rows[:1], []]
    folder.write_json_lines(layout.METRICS, rows)
    Follower(folder, str, sent.append).poll()  # what was there before is not news
    assert capsys.readouterr().out == ""


def test_training_and_pretraining_tell_epochs_and_rounds() -> None:
    config = SelfSupervisionConfig(num_epochs=3, max_rounds=5)
    epoch = {"epoch": 2.0, "pretext": 1.25, "seconds": 12.0}
    line = "pretext epoch 2/3: pretext 1.250; 12 s, 0:00:12 left"
    assert pretraining_line(config, epoch) == line
    round_ = {"epoch": 3.0, "round": 1.0, "cluster": 0.5, "changed_share": 0.25, "seconds": 4.0}
    line = "round 1/5: cluster 0.500; 25.0% of the slices changed cluster; 4 s"
    assert pretraining_line(config, round_) == line
    times = {"time/epoch_s": 10.0, "time/images_per_s": 30.4, "train/image_size": 256.0}
    metrics = {"epoch": 1.0, "train/loss/total": 0.5, "cluster/nmi_previous": 0.75} | times
    line = "epoch 1/3: loss 0.500, NMI vs previous 0.750; 10 s, 30 images/s, 0:00:20 left"
    assert training_line(TrainConfig(num_epochs=3), metrics) == line
