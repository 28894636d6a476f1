from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from brainray.benchmarks.samples import pictures_by_class
from brainray.benchmarks.subjects import measure_by_class, measure_by_order
from brainray.config import SubjectConfig
from brainray.mri.phantom import make_series

NUM_SUBJECTS, LENGTH = 12, 4


def write_series(folder: Path, num_subjects: int = NUM_SUBJECTS) -> None:
    for subject in range(num_subjects):
        rng = np.random.default_rng(subject)
        for number, phantom in enumerate(make_series("glioma", rng, LENGTH, 96)):
            path = folder / f"class{subject % 2}" / f"{subject}-{number}.png"
            path.parent.mkdir(exist_ok=True, parents=True)
            cv2.imwrite(str(path), phantom.image)


def test_links_within_subjects_are_right_and_such_between_classes_are_counted(
    tmp_path: Path,
) -> None:
    write_series(tmp_path)
    pictures = pictures_by_class(tmp_path)
    thumbnails, classes = pictures.thumbnails, pictures.classes
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
    pictures = pictures_by_class(None)
    assert len(pictures.thumbnails) == len(pictures.paths) == len(pictures.classes) == 0


def test_files_that_are_numbered_by_series_are_parted_less_and_shuffled_ones_are_not(
    tmp_path: Path,
) -> None:
    write_series(tmp_path, num_subjects=40)
    pictures = pictures_by_class(tmp_path)
    shuffled = np.random.default_rng(0).permutation(len(pictures.paths))
    shown = replace(
        pictures, thumbnails=pictures.thumbnails[shuffled], classes=pictures.classes[shuffled]
    )
    ordered, disordered = (
        {m.name: m.value for m in measure_by_order(made, SubjectConfig(), seed=0)["all"]}
        for made in (pictures, shown)
    )
    together, by_chance = "successive files in one group", "any two files in one group"
    assert ordered[together] > 0.6 > 5 * disordered[together]
    assert ordered[by_chance] == pytest.approx(disordered[by_chance])
    leak = {
        kind: ordered[f"leak to next slice, {kind}"]
        for kind in ("random split", "grouped split without file order", "grouped split")
    }
    assert leak["random split"] > 0.8
    assert 2 * leak["grouped split"] < leak["grouped split without file order"] < 0.6
