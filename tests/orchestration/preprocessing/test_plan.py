"""What a store will hold, decided from the light columns alone."""

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from brainray.benchmarks.duplicates import fingerprint
from brainray.config import Config, PreprocessConfig
from brainray.errors import DataError
from brainray.mri.duplicates import COPY, MIRRORED, DuplicatePairs
from brainray.mri.phantom import CLASSES, make_slice
from brainray.mri.row_file import RowFile
from brainray.orchestration.preprocessing.grouping import (
    _with_names_from_table,
    _with_subjects_of_copies,
)
from brainray.orchestration.preprocessing.leakage import _links_of, _within
from brainray.orchestration.preprocessing.plan import (
    StorePlan,
    _check_classes,
    _first_copies,
    _statistics,
    official_splits,
    plan_store,
)
from brainray.orchestration.preprocessing.previous_records import LIGHT, PreviousRecords
from brainray.orchestration.preprocessing.slice_rows import Subject
from brainray.orchestration.preprocessing.source import FoundFile, Listing, SourceFile


def plan(test_label: str, headers: dict[int, str] | None = None) -> StorePlan:
    """Two training slices of each of two classes; the test slice copies the first of them.

    ``headers`` name the subjects of some.
    """
    rng = np.random.default_rng(0)
    fingerprints = RowFile(96 * 96, np.uint8)
    fingerprints.append(rng.integers(0, 255, (4, 96 * 96)).astype(np.uint8))
    files, rows = [], []
    for number, (label, picture) in enumerate(
        zip(["a", "a", "b", "b", test_label], [0, 1, 2, 3, 0], strict=True)
    ):
        found = FoundFile(f"{number}.jpg", 1, 1)
        files.append(SourceFile("train" if number < 4 else "test", label, file=found))
        rows.append(
            dict.fromkeys(LIGHT.names)
            | {
                "path": found.path,
                "frame": "",
                "sha256": str(picture).ljust(64, "0"),
                "sample_id": str(picture).ljust(32, "0"),
                "pixel_sum": 1000,
                "pixel_square_sum": 9_000_000,
                "skull_strip": "otsu",
                "header_subject": (headers or {}).get(number),
                "fingerprint": picture,
                "part": "part.parquet",
            }
        )
    slices = pa.Table.from_pylist(rows, schema=LIGHT)
    return plan_store(
        slices,
        fingerprints,
        Listing(files, Counter(), []),
        Config(),
        PreviousRecords.from_store(None),
    )


def test_slices_that_nothing_names_are_estimated_beside_named_ones() -> None:
    rows = {row["path"]: row for row in plan("a", {1: "12ab", 3: "12ab"}).rows.to_pylist()}
    sources = [rows[f"{number}.jpg"]["subject_source"] for number in range(5)]
    assert sources == ["estimated", "header", "estimated", "header", "estimated"]
    subjects = [rows[f"{number}.jpg"]["subject_id"] for number in range(5)]
    assert subjects[1] == subjects[3] == "12ab"
    assert subjects[0] == subjects[4]  # copies


def test_a_test_label_decides_nothing_about_its_training_twin() -> None:
    agreeing, conflicting = plan("a"), plan("b")
    for made in (agreeing, conflicting):
        assert made.rows["label"].to_pylist()[:4] == ["a", "a", "b", "b"]
    assert agreeing.leakage["label_conflicts"] == []
    paths = [row["path"] for row in conflicting.leakage["label_conflicts"]]
    assert paths == ["0.jpg", "4.jpg"]
    (twin,) = agreeing.leakage["across_splits"]["exact"]
    assert (twin["path"], twin["twin"]) == ("4.jpg", "0.jpg")


def test_of_identical_files_the_training_one_with_a_label_is_kept() -> None:
    ids = ["x", "x", "x", "y"]
    assert _first_copies(ids, None, [None, "a", "a", None]) == [1, None, 1, None]
    splits = ["test", "train", "train", "train"]
    assert _first_copies(ids, splits, ["a", None, "a", None]) == [2, 2, None, None]


def test_copies_within_a_split_are_counted_whatever_the_other_split_holds() -> None:
    """The first of equal fingerprints, of which alone the pairs speak, is a test slice here."""
    fingerprint_ids = np.array([0, 0, 0, 1])
    pairs = DuplicatePairs(
        first=np.array([0, 0, 0]),
        second=np.array([1, 2, 3]),
        kind=np.array([COPY, COPY, MIRRORED], np.int8),
        similarity=np.array([1, 1, 0.9], np.float32),
    )
    everything = [(0, 1, COPY, 1.0), (0, 2, COPY, 1.0), (0, 3, MIRRORED, 0.9)]
    found = _links_of(np.arange(4), fingerprint_ids, pairs)
    np.testing.assert_allclose(found, everything, rtol=1e-6)
    train_links = _links_of(np.array([1, 2, 3]), fingerprint_ids, pairs)
    assert [link[:3] for link in train_links] == [(1, 2, COPY), (1, 3, MIRRORED)]


def _subjects(*names_and_sources: str) -> list[Subject]:
    """Subjects written as "NAME SOURCE"; "" is nobody."""
    return [Subject(*text.split()) for text in names_and_sources]


def test_a_patient_whom_a_table_names_in_part_stays_one() -> None:
    given = _subjects(
        *("t1 table", "h1 header", "t2 table", "h2 header", "t3 table", "h2 header", "h3 header"),
        "",
        # A volume and a copy of its file, which the table names.
        *("v1 volume", "t4 table"),
    )
    headers = ["h1", "h1", "h2", "h2", "h2", "h2", "h3", None, "v1", "v1"]
    assert _with_names_from_table(given, headers) == _subjects(
        *("t1 table", "t1 table"),
        # h2 stands for two of the table's patients.
        *("t2 table", "h2 header", "t3 table", "h2 header", "h3 header"),
        "",
        *("t4 table", "t4 table"),
    )


def test_a_nameless_copy_has_the_subject_of_the_named_one() -> None:
    given = _subjects("", "p1 table", "", "p2 table", "p3 header")
    found = _with_subjects_of_copies(["x", "x", "y", "z", "z"], given)
    assert found == _subjects("p1 table", "p1 table", "", "p2 table", "p3 header")


def test_a_slice_within_a_split_is_reported_on_one_level() -> None:
    """Two byte-identical files and a copy of theirs: one exact, one near."""
    table = pa.table(
        {
            "path": ["a", "b", "c"],
            "frame": [""] * 3,
            "sha256": ["x", "y", "x"],
            "split": ["train"] * 3,
        }
    )
    pairs = DuplicatePairs(
        first=np.array([0, 0]),
        second=np.array([1, 2]),
        kind=np.array([COPY, COPY], np.int8),
        similarity=np.ones(2, np.float32),
    )
    found = _within(table, np.array([0, 1, 0]), pairs, "train")
    paths = {level: [(row["path"], row["twin"]) for row in rows] for level, rows in found.items()}
    assert paths == {"exact": [("c", "a")], "near": [("b", "a")], "turned": []}


def recorded(**columns: list[Any]) -> dict[str, Any]:
    """Statistics of a store of four training slices and a test slice with these columns."""
    planned = plan("a")
    rows = planned.rows
    for name, values in columns.items():
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
    return _statistics(rows, ["a", "b"], planned.duplicates, PreprocessConfig(image_size=16))


def test_pixels_are_standardised_by_those_of_training_slices() -> None:
    white, white_square = 16**2 * 255, 16**2 * 255**2
    statistics = recorded(
        pixel_sum=[0, white, 0, white, white],
        pixel_square_sum=[0, white_square, 0, white_square, white_square],
    )
    assert (statistics["pixel_mean"], statistics["pixel_std"]) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("column", "hashed"),
    [
        ("draw_group_id", "data_hash"),
        ("kin_group_id", "data_hash"),
        ("split_group_id", "slices_hash"),
    ],
)
def test_a_hash_tells_changes_of_the_groups_that_its_users_rely_on(
    column: str, hashed: str
) -> None:
    before, joined = recorded(), recorded(**{column: ["0"] * 5})
    changed = {name for name in ("data_hash", "slices_hash") if joined[name] != before[name]}
    assert changed == {hashed}


def test_what_to_do_about_a_class_of_test_slices_alone_depends_on_who_held_them_out() -> None:
    rows = pa.table({"split": ["train", "test"], "label": ["a", "b"]})
    with pytest.raises(DataError, match=r"rename with --set classes\.map\.b=NAME"):
        _check_classes(rows, {}, was_drawn_before=False)
    with pytest.raises(DataError, match="of subjects held out for testing: label slices of"):
        _check_classes(rows, {}, was_drawn_before=True)
    with pytest.raises(
        DataError, match=r"classes\.map\.bb=b makes such a class: map to a known one instead"
    ):
        _check_classes(rows, {"bb": "b"}, was_drawn_before=False)


def test_a_drawn_split_leaves_training_the_only_usable_slice_of_a_class() -> None:
    """The others of the rare class have mirrored copies that are called common."""
    rng = np.random.default_rng(1)
    heads = [make_slice(CLASSES[0], rng, size=96).image for _ in range(14)]
    labelled = [(head, "common") for head in heads[:10]] + [(head, "rare") for head in heads[10:]]
    labelled += [(np.ascontiguousarray(head[:, ::-1]), "common") for head in heads[11:]]
    fingerprints = RowFile(96 * 96, np.uint8)
    fingerprints.append(np.stack([fingerprint(image) for image, _ in labelled]))
    files, rows = [], []
    for number, (_, label) in enumerate(labelled):
        found = FoundFile(f"{number}.jpg", 1, 1)
        files.append(SourceFile(None, label, file=found))
        identity = hashlib.sha256(bytes([number])).hexdigest()
        rows.append(
            dict.fromkeys(LIGHT.names)
            | {
                "path": found.path,
                "frame": "",
                "sha256": identity,
                "sample_id": identity[:32],
                "pixel_sum": 1000,
                "pixel_square_sum": 9_000_000,
                "skull_strip": "otsu",
                "fingerprint": number,
                "part": "part.parquet",
            }
        )
    for seed in range(8):
        split = {"mode": "grouped", "seed": seed}
        config = Config.model_validate(
            {"split": split, "preprocess": {"subject": {"estimate": False}}, "source": "/data"}
        )
        planned = plan_store(
            pa.Table.from_pylist(rows, schema=LIGHT),
            fingerprints,
            Listing(files, Counter(), []),
            config,
            PreviousRecords.from_store(None),
        )
        conflicts = planned.leakage["label_conflicts"]
        assert len(conflicts) == 6
        (usable,) = (row for row in planned.rows.to_pylist() if row["path"] == "10.jpg")
        assert (usable["split"], usable["label"]) == ("train", "rare")


def test_a_purge_needs_a_test_part_of_the_source() -> None:
    config = Config.model_validate({"split": {"mode": "purge"}, "source": "/data"})
    one, other = (SourceFile("train", file=FoundFile(name, 1, 1)) for name in ("a", "b"))
    with pytest.raises(
        DataError, match=r"split\.mode=purge needs a test split, but /data has none"
    ):
        official_splits([one, other], config)
    assert official_splits([one, replace(other, split="test")], config) == ["train", "test"]
