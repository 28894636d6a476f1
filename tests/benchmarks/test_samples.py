"""Which files a quick benchmark takes."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from brainray.benchmarks import samples
from brainray.benchmarks.samples import load_slices, spread
from brainray.errors import DataError
from brainray.mri.phantom import CLASSES


def test_files_that_are_spread_keep_the_share_of_every_class() -> None:
    files = [*"a" * 46, *"b" * 47, *"c" * 61, *"d" * 45]  # 199, sorted by class
    taken = spread(files, 100)
    assert len(taken) == 100
    for name in "abcd":
        assert abs(taken.count(name) - files.count(name) * 100 / 199) <= 1
    assert spread(files, 1000) == files
    assert spread([], 3) == []


def test_slices_of_a_folder_are_read_in_an_order_of_the_seed(tmp_path: Path) -> None:
    for side, name in enumerate(["a.jpg", "b.JPEG", "c.png", "d.PNG", "e.txt"], start=8):
        content = cv2.imencode(".png", np.zeros((side, side), np.uint8))[1].tobytes()
        (tmp_path / name).write_bytes(content)
    orders = [[len(image) for image in load_slices(tmp_path, seed)] for seed in range(5)]
    assert all(sorted(order) == [8, 9, 10, 11] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert [len(image) for image in load_slices(tmp_path, 0, limit=2)] == orders[0][:2]
    with pytest.raises(DataError, match="no JPEG or PNG"):
        load_slices(tmp_path / "nowhere", 0)


def test_phantoms_are_of_all_classes_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def make_slice(class_name: str, rng: object) -> SimpleNamespace:
        drawn.append(class_name)
        return SimpleNamespace(image=None)

    monkeypatch.setattr(samples, "make_slice", make_slice)
    assert len(load_slices(None, 0)) == len(drawn)
    assert len(set(Counter(drawn).values())) == 1
    assert set(drawn) == set(CLASSES)
