"""Groups of slices: copies of one another, and slices of one subject."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from brainray.config import Config, PreprocessConfig, SubjectConfig
from brainray.mri.phantom import make_series
from brainray.mri.resize import thumbnail
from brainray.mri.thumbnails import thumbnail_matrix
from brainray.orchestration.prediction.evaluation import _groups
from brainray.orchestration.preprocessing.grouping import (
    SliceGroups,
    group_slices,
    group_strangers,
)
from brainray.orchestration.preprocessing.previous_records import FILES, PreviousRecords
from brainray.orchestration.preprocessing.slice_rows import Subject
from brainray.orchestration.preprocessing.source import FoundFile, Listing, SourceFile

CONFIG = PreprocessConfig()


def accepted(
    images: list[np.ndarray], names: str, subjects: list[str | None] | None = None
) -> pa.Table:
    return pa.table(
        {
            "sample_id": list(names),
            "sha256": list(names),
            "frame": [""] * len(images),
            "label": ["glioma"] * len(images),
            "thumbnail": [thumbnail(np.ascontiguousarray(image)).tobytes() for image in images],
            "subject_id": pa.array(subjects or [None] * len(images), pa.string()),
        }
    )


@pytest.fixture(scope="module")
def series() -> list[list[np.ndarray]]:
    """Three neighbouring slices of each of two subjects."""
    rng = np.random.default_rng(0)
    return [[found.image for found in make_series("glioma", rng, 3)] for _ in range(2)]


def parts(groups: list[str], names: str) -> set[str]:
    """The names of every group, together."""
    return {
        "".join(name for name, other in zip(names, groups, strict=True) if other == group)
        for group in groups
    }


def reencoded(image: np.ndarray) -> np.ndarray:
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE))


def test_copies_and_likely_subjects_are_grouped(series: list[list[np.ndarray]]) -> None:
    first, second = series
    table = accepted([*first, reencoded(first[0]), *second, second[1][:, ::-1]], "abcdefgh")
    groups = group_strangers(table, CONFIG)
    assert parts(groups.copies, "abcdefgh") == {"ad", "b", "c", "e", "f", "g", "h"}
    assert parts(groups.dependent, "abcdefgh") == {"abcd", "efgh"}


def test_names_and_copies_in_any_orientation_are_grouped_without_an_estimate(
    series: list[list[np.ndarray]],
) -> None:
    first, second = series
    images = [*first, second[0], second[2], second[2][:, ::-1]]
    table = accepted(images, "abcdef", ["p1", None, None, "p1", None, None])
    config = CONFIG.model_copy(update={"subject": SubjectConfig(estimate=False)})
    groups = group_strangers(table, config)
    assert parts(groups.dependent, "abcdef") == {"ad", "b", "c", "ef"}


def test_slices_at_two_positions_of_a_volume_are_no_copies(series: list[list[np.ndarray]]) -> None:
    first, second, third = series[0][0], series[0][2], series[1][1]
    images = [first, reencoded(first), second, second, third, reencoded(third)]
    table = accepted(images, "abcdef")
    columns = {
        "sha256": ["v", "v", "p", "p", "v", "w"],  # c and d are two files with the same bytes
        "frame": ["axial=1", "axial=2", "", "", "axial=3", "axial=3"],
    }
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(column))
    assert parts(group_strangers(table, CONFIG).copies, "abcdef") == {"a", "b", "cd", "ef"}


def stored(
    images: list[np.ndarray],
    names: str,
    storage: Path,
    *,
    subjects: dict[str, str] | None = None,
    before: dict[str, Subject] | None = None,
    headers: dict[str, tuple[str, str]] | None = None,
) -> SliceGroups:
    """Groups in a store, of which a labels table names some ``subjects``; ``before`` are those of
    the slices that the store has held, ``headers`` subjects and studies.
    """
    table = accepted(images, names).append_column("path", pa.array(list(names)))
    for place, column in enumerate(("header_subject", "header_study")):
        values = [headers[name][place] if headers else None for name in names]
        table = table.append_column(column, pa.array(values, pa.string()))
    recorded = [
        {"sample_id": name, "subject_id": subject.name, "subject_source": subject.source}
        for name, subject in (before or {}).items()
    ]
    files = [
        SourceFile(subject=(subjects or {}).get(name), file=FoundFile(name, 1, 1)) for name in names
    ]
    return group_slices(
        table,
        thumbnail_matrix(table["thumbnail"].to_pylist()),
        Listing(files, Counter(), []),
        Config(storage=str(storage)),
        PreviousRecords(1, pa.Table.from_pylist(recorded, schema=FILES), None),
    )


def test_draws_part_turned_copies_and_likely_subjects_and_no_split_does(
    series: list[list[np.ndarray]], tmp_path: Path
) -> None:
    (a, c, d), (b, e, g) = series
    images = [a, b, c, d, e, e[:, ::-1], g]
    named = {"a": "anna", "b": "anna", "e": "ben"}
    groups = stored(images, "abcdefg", tmp_path, subjects=named)
    sources = [subject.source for subject in groups.subjects]
    assert sources == ["table" if name in named else "estimated" for name in "abcdefg"]
    assert parts(groups.copies, "abcdefg") == set("abcdefg")
    assert parts(groups.draw, "abcdefg") == {"ab", *"cdefg"}
    assert parts(groups.kin, "abcdefg") == {"ab", "ef", *"cdg"}
    assert parts(groups.split, "abcdefg") == {"ab", "cd", "efg"}


def test_no_split_parts_a_study_of_which_some_files_name_the_patient(
    series: list[list[np.ndarray]], tmp_path: Path
) -> None:
    images = [*series[0], *series[1]]
    headers = {
        "a": ("p1", "study-1"),
        "b": ("study-1", "study-1"),
        # One UID for all: p2 and p3 are not to be taken for one.
        "c": ("p2", "study-2"),
        "d": ("p3", "study-2"),
        # A table tells otherwise.
        "e": ("p4", "study-3"),
        "f": ("study-3", "study-3"),
    }
    subjects = {"e": "x", "f": "y"}
    groups = stored(images, "abcdef", tmp_path, subjects=subjects, headers=headers)
    for level in (groups.draw, groups.split):
        assert parts(level, "abcdef") == {"ab", "c", "d", "e", "f"}
    assert groups.subjects[0].name != groups.subjects[1].name


@pytest.mark.parametrize("named", ["a", "b", "ab"])
def test_naming_the_patient_of_some_files_in_a_table_parts_no_study(
    series: list[list[np.ndarray]], tmp_path: Path, named: str
) -> None:
    headers = {
        "a": ("p1", "study-1"),
        "b": ("study-1", "study-1"),
        "c": ("study-1", "study-1"),
        "d": ("p1", "study-2"),
        "e": ("study-3", "study-3"),
        "f": ("study-4", "study-4"),
    }
    subjects = dict.fromkeys(named, "anna")
    groups = stored(
        [*series[0], *series[1]], "abcdef", tmp_path, subjects=subjects, headers=headers
    )
    for level in (groups.draw, groups.split):
        assert parts(level, "abcdef") == {"abcd", "e", "f"}


def test_a_slice_keeps_the_subject_that_it_was_estimated_to_be_of(
    series: list[list[np.ndarray]], tmp_path: Path
) -> None:
    before = {
        "a": Subject("estimated-y", "estimated"),
        "b": Subject("estimated-x", "estimated"),
        "d": Subject("anna", "table"),  # which has no subjects any more
    }
    groups = stored([*series[0], *series[1]], "abcdef", tmp_path, before=before)
    names = [subject.name for subject in groups.subjects]
    assert names == ["estimated-y", "estimated-x", "estimated-x", *["estimated-d"] * 3]
    assert parts(groups.split, "abcdef") == {"a", "bc", "def"}


def test_a_copy_of_a_runs_own_test_slice_is_drawn_with_it(series: list[list[np.ndarray]]) -> None:
    first, second = series
    known = {"a": "one", "b": "other"}
    table = accepted([first[0], second[0], reencoded(first[0]), second[1]], "abcd")
    groups = _groups(table, CONFIG, known)
    assert parts([groups[name] for name in "abcd"], "abcd") == {"ac", "bd"}
    assert _groups(table.slice(0, 2), CONFIG, known) == known
