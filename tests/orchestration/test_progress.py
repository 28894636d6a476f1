"""What a user sees of training while it runs."""

import time
from datetime import timedelta

from brainray.config import TrainConfig
from brainray.orchestration.progress import Watcher, time_left


class Flaky(Watcher):
    """Its storage is away for the first two looks."""

    num_looks = 0

    def look(self) -> None:
        self.num_looks += 1
        if self.num_looks <= 2:
            raise OSError("storage is away")


def test_a_failed_look_is_said_once_and_the_next_goes_on() -> None:
    said: list[str] = []
    with Flaky(said.append) as flaky:
        deadline = time.monotonic() + 20
        while flaky.num_looks < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert flaky.num_looks >= 4  # the last of them at the end of the block
    assert said == ["progress cannot be told at the moment: OSError: storage is away"]


def test_time_left_counts_pixels() -> None:
    growing = TrainConfig(image_size=128, start_image_size=64, growth_epochs=2, num_epochs=4)
    first = {"epoch": 1.0, "train/image_size": 64.0, "time/epoch_s": 10.0}
    assert time_left(first, growing) == timedelta(seconds=round(10 * (96**2 + 2 * 128**2) / 64**2))
    last = {"epoch": 4.0, "train/image_size": 128.0, "time/epoch_s": 40.0}
    assert time_left(last, growing) == timedelta(0)
