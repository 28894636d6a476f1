from pathlib import Path

import cv2
import numpy as np
import pytest

from brainray.benchmarks.samples import pictures_by_class
from brainray.benchmarks.subjects import measure_by_class
from brainray.config import SubjectConfig
from brainray.mri.phantom import make_series

NUM_SUBJECTS, LENGTH = 12, 4


def write_series(folder: Path) -> None:
    for subject in range(NUM_SUBJECTS):
        rng = np.random.default_rng(subject)
        for number, phantom in enumerate(make_series("glioma", rng, LENGTH, 96)):
            path = folder / f"class{subject % 2}" / f"{subject}-{number}.png"
            path.parent.mkdir(exist_ok=True, parents=True)
            cv2.imwrite(str(path), phantom.image)


def test_links_within_subjects_are_right_and_such_between_classes_are_counted(
    tmp_path: Path,
) -> None:
    write_series(tmp_path)
    thumbnails, classes = pictures_by_class(tmp_path)
    assert thumbnails.shape == (NUM_SUBJECTS * LENGTH, 96 * 96)
    assert sorted(set(classes)) == ["class0", "class1"]
    right = {m.name: m.value for m in measure_by_class(thumbnails, classes, SubjectConfig())}
    assert right["views with a link"] > 0.5
    assert right["false links, by class"] == right["false pairs in a group, by class"] == 0.0

    rng = np.random.default_rng(0)
    values = [
        [m.value for m in measure_by_class(thumbnails, rng.permutation(classes), SubjectConfig())]
        for _ in range(20)
    ]
    _, links, pairs = np.mean(values, axis=0)
    assert links == pytest.approx(1.0, abs=0.15)  # classes that say nothing
    assert pairs == pytest.approx(1.0, abs=0.15)


def test_without_a_folder_there_are_no_pictures() -> None:
    thumbnails, classes = pictures_by_class(None)
    assert len(thumbnails) == len(classes) == 0
