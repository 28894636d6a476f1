"""What a store will hold, decided from the light columns alone."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from brainray.benchmarks.duplicates import fingerprint
from brainray.config import Config, PreprocessConfig
from brainray.errors import DataError
from brainray.mri.duplicates import COPY, MIRRORED, DuplicatePairs
from brainray.mri.phantom import CLASSES, make_series, make_slice
from brainray.mri.row_file import RowFile
from brainray.orchestration.preprocessing.grouping import (
    _with_names_from_table,
    _with_subjects_of_copies,
)
from brainray.orchestration.preprocessing.leakage import _links_of, _within
from brainray.orchestration.preprocessing.plan import (
    StorePlan,
    _check_classes,
    _check_rejections,
    _count_by_split_and_class,
    _first_copies,
    _statistics,
    official_splits,
    plan_store,
)
from brainray.orchestration.preprocessing.previous_records import FILES, LIGHT, PreviousRecords
from brainray.orchestration.preprocessing.slice_rows import Subject
from brainray.orchestration.preprocessing.source import FoundFile, Listing, SourceFile
from brainray.storage import Folder


def light(path: str, sha256: str, fingerprint: int) -> dict[str, Any]:
    """A LIGHT row of the one slice of a file."""
    about = {"path": path, "frame": "", "sha256": sha256, "sample_id": sha256[:32]}
    pixels = {"pixel_sum": 1000, "pixel_square_sum": 9_000_000, "skull_strip": "otsu"}
    stored = {"fingerprint": fingerprint, "part": "part.parquet"}
    return dict.fromkeys(LIGHT.names) | about | pixels | stored


def plan(test_label: str | None, headers: dict[int, str] | None = None) -> StorePlan:
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
        header = (headers or {}).get(number)
        rows.append(
            light(found.path, str(picture).ljust(64, "0"), picture) | {"header_subject": header}
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


@pytest.mark.parametrize(("label", "is_told"), [("a", False), (None, True)])
def test_a_test_part_without_labels_is_told(
    label: str | None, is_told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(label)
    assert ("note: no test slice has a label" in capsys.readouterr().out) == is_told


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
        ("label", "data_hash"),
        ("draw_group_id", "data_hash"),
        ("kin_group_id", "data_hash"),
        ("split_group_id", "slices_hash"),
    ],
)
def test_a_hash_tells_changes_of_the_columns_that_its_users_rely_on(
    column: str, hashed: str
) -> None:
    before, joined = recorded(), recorded(**{column: ["0"] * 5})
    changed = {name for name in ("data_hash", "slices_hash") if joined[name] != before[name]}
    assert changed == {hashed}


def test_the_hash_of_a_store_tells_updates_settings_and_no_order() -> None:
    planned, config = plan("a"), PreprocessConfig()

    def hashes(rows: pa.Table, config: PreprocessConfig) -> tuple[str, str]:
        found = _statistics(rows, ["a", "b"], planned.duplicates, config)
        return found["data_hash"], found["slices_hash"]

    data, slices = hashes(planned.rows, config)
    assert hashes(planned.rows.take([3, 1, 4, 0, 2]), config) == (data, slices)
    other_tasks = config.model_copy(update={"files_per_task": 7, "max_rejected_fraction": 0.9})
    assert hashes(planned.rows, other_tasks) == (data, slices)
    stripped = hashes(planned.rows, config.model_copy(update={"skull_strip": "none"}))
    assert stripped[0] != data
    assert stripped[1] != slices
    column = planned.rows.column_names.index("generation")
    updated = planned.rows.set_column(column, "generation", pa.array([0, 0, 0, 1, 0]))
    assert hashes(updated, config)[0] != data
    assert hashes(updated, config)[1] == slices


def test_what_to_do_about_a_class_of_test_slices_alone_depends_on_who_held_them_out() -> None:
    rows = pa.table({"split": ["train", "test"], "label": ["a", "b"]})
    with pytest.raises(DataError, match=r"rename with --set classes\.map\.b=NAME"):
        _check_classes(rows, rows, {}, was_drawn_before=False)
    with pytest.raises(DataError, match="of subjects held out for testing: label slices of"):
        _check_classes(rows, rows, {}, was_drawn_before=True)
    with pytest.raises(
        DataError, match=r"classes\.map\.bb=b makes such a class: map to a known one instead"
    ):
        _check_classes(rows, rows, {"bb": "b"}, was_drawn_before=False)


def test_the_classes_are_those_of_training_slices() -> None:
    rows = pa.table({"split": ["train", "test"], "label": pa.array([None, "b"], pa.string())})
    assert _check_classes(rows, rows, {}, was_drawn_before=False) == []


def test_a_file_is_rejected_if_none_of_its_slices_is_accepted() -> None:
    slices = pa.table(
        {
            "path": ["volume", "volume", "bad", "bad"],
            "reason": [None, "blank", "blank", "blank"],
            "detail": pa.nulls(4, pa.string()),
        }
    )

    def check(most: float, num_files: int = 2) -> None:
        settings = {"preprocess": {"max_rejected_fraction": most}, "source": "/data"}
        _check_rejections(slices, num_files, Config.model_validate(settings))

    check(0.5)
    with pytest.raises(DataError, match=r"1 of 2 files in /data were rejected, .*: blank \(2"):
        check(0.49)
    with pytest.raises(DataError, match="none of the 1 files in /data is usable"):
        check(1.0, num_files=1)


Picture = np.ndarray


def planned(
    *slices: tuple[str | None, str | None, Picture],
    records: PreviousRecords | None = None,
    subjects: dict[int, str] | None = None,
    **settings: Any,
) -> StorePlan:
    """Plan of slices with a split, a label and a picture; equal pictures are identical files."""
    fingerprints = RowFile(96 * 96, np.uint8)
    fingerprints.append(np.stack([fingerprint(picture) for _, _, picture in slices]))
    files, rows = [], []
    for number, (split, label, picture) in enumerate(slices):
        found = FoundFile(f"{number}.jpg", 1, 1)
        files.append(SourceFile(split, label, (subjects or {}).get(number), file=found))
        rows.append(light(found.path, hashlib.sha256(picture.tobytes()).hexdigest(), number))
    estimate = settings.pop("estimate", False)
    settings |= {"preprocess": {"subject": {"estimate": estimate}}, "source": "/data"}
    return plan_store(
        pa.Table.from_pylist(rows, schema=LIGHT),
        fingerprints,
        Listing(files, Counter(), []),
        Config.model_validate(settings),
        records or PreviousRecords.from_store(None),
    )


@pytest.fixture(scope="module")
def heads() -> list[Picture]:
    rng = np.random.default_rng(1)
    return [make_slice(CLASSES[0], rng, size=96).image for _ in range(12)]


def test_a_purge_drops_mirrored_copies_of_test_slices_too(
    heads: list[Picture], tmp_path: Path
) -> None:
    a, b, c, d = heads[:4]
    made = planned(
        ("train", "x", a),
        ("train", "x", np.ascontiguousarray(b[:, ::-1])),
        ("train", "y", c),
        ("train", "y", d // 8 * 7),
        ("test", "x", b),
        ("test", "y", d),
        storage=str(tmp_path),
        split={"mode": "purge"},
    )
    assert made.rows["path"].to_pylist() == ["0.jpg", "2.jpg", "4.jpg", "5.jpg"]


def test_a_class_whose_training_slices_are_lost_is_not_to_be_renamed(
    heads: list[Picture], tmp_path: Path
) -> None:
    a, b, c = heads[:3]
    slices = [("train", "x", a), ("train", "y", b), ("test", "x", c)]
    purge: dict[str, Any] = {"storage": str(tmp_path), "split": {"mode": "purge"}}
    message = "no training slice of class 'y' can be used: all are copies"
    with pytest.raises(DataError, match=message):
        planned(*slices, ("test", "y", b), **purge)
    contradicting = ("train", "x", np.ascontiguousarray(b[:, ::-1]))
    with pytest.raises(DataError, match=message):
        planned(*slices, contradicting, ("test", "y", heads[3]), storage=str(tmp_path))


def test_statistics_of_a_store_count_its_slices_and_its_removed_copies(
    heads: list[Picture], tmp_path: Path
) -> None:
    made = planned(
        ("train", "x", heads[0]),
        ("train", "x", heads[0]),
        ("train", None, heads[1]),
        ("test", "x", heads[0]),
        storage=str(tmp_path),
    )
    assert made.rows["path"].to_pylist() == ["0.jpg", "2.jpg", "3.jpg"]
    assert made.statistics["num_removed_copies"] == 1
    assert made.statistics["num_slices"] == {"test": {"x": 1}, "train": {"": 1, "x": 1}}
    assert made.files["path"].to_pylist() == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert made.leakage["within_train"]["exact"] == [{"path": "1.jpg", "twin": "0.jpg"}]
    assert made.leakage["within_test"]["exact"] == []
    assert [row["path"] for row in made.leakage["across_splits"]["exact"]] == ["3.jpg"]


def test_a_copy_is_listed_with_a_slice_that_was_kept_of_training_if_there_is_one(
    heads: list[Picture], tmp_path: Path
) -> None:
    one, other = heads[:2]
    made = planned(
        ("test", "x", one),
        ("train", None, one // 8 * 7),
        ("train", "x", one // 8 * 7),
        ("train", "x", one // 8 * 6),
        ("train", "y", other),
        storage=str(tmp_path),
    )
    assert [
        (row["path"], row["kept_path"], row["level"], row["removed"])
        for row in made.duplicates.to_pylist()
    ] == [
        ("0.jpg", "2.jpg", "near", False),
        ("1.jpg", "2.jpg", "exact", True),
        ("3.jpg", "2.jpg", "near", False),
    ]


def test_a_copy_is_of_a_kind_wherever_its_original_is_listed(
    heads: list[Picture], tmp_path: Path
) -> None:
    mirrored = np.ascontiguousarray(heads[1][:, ::-1])
    made = planned(
        ("test", "x", heads[0]),
        ("test", "x", mirrored),
        ("train", "x", heads[0] // 8 * 7),
        ("train", "x", heads[1]),
        storage=str(tmp_path),
    )
    listed = [(row["path"], row["kept_path"], row["kind"]) for row in made.duplicates.to_pylist()]
    assert listed == [("0.jpg", "2.jpg", "copy"), ("1.jpg", "3.jpg", "mirrored")]


def test_a_copy_is_of_a_kind_although_another_of_the_same_bytes_was_compared(
    heads: list[Picture], tmp_path: Path
) -> None:
    """Pairs name the first slice of equal bytes; here the second one, with a label, is kept."""
    made = planned(
        ("train", None, heads[0]),
        ("train", "x", heads[0]),
        ("train", "x", heads[0] // 8 * 7),
        ("train", "x", np.ascontiguousarray(heads[0][:, ::-1])),
        storage=str(tmp_path),
    )
    listed = [
        (row["path"], row["kept_path"], row["level"], row["kind"])
        for row in made.duplicates.to_pylist()
    ]
    assert listed == [
        ("0.jpg", "1.jpg", "exact", "copy"),
        ("2.jpg", "1.jpg", "near", "copy"),
        ("3.jpg", "1.jpg", "turned", "mirrored"),
    ]


def test_a_drawn_split_separates_no_slices_that_are_likely_of_one_subject(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    series = [made.image for _ in range(5) for made in make_series("glioma", rng, 3, 96)]
    made = planned(*((None, "x", image) for image in series), storage=str(tmp_path), estimate=True)
    splits: dict[str, set[str]] = {}
    for row in made.rows.to_pylist():
        splits.setdefault(row["subject_id"], set()).add(row["split"])
    assert len(splits) < len(series) / 2
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "test"}


@pytest.mark.parametrize("held_out", [0, 1])
def test_what_joins_both_sides_of_a_split_is_held_out(
    heads: list[Picture], tmp_path: Path, held_out: int
) -> None:
    ids = [hashlib.sha256(head.tobytes()).hexdigest()[:32] for head in heads]
    before = ["test" if number == held_out else "train" for number in range(len(heads))]
    Folder(tmp_path).write_table("splits.parquet", pa.table({"sample_id": ids, "split": before}))
    made = planned(
        *((None, "x", head) for head in heads),
        records=PreviousRecords(1, FILES.empty_table(), Folder(tmp_path) / "images"),
        subjects={0: "anna", 1: "anna"},
        storage=str(tmp_path),
    )
    splits = dict(zip(made.rows["path"].to_pylist(), made.rows["split"].to_pylist(), strict=True))
    assert [path for path, split in splits.items() if split == "test"] == ["0.jpg", "1.jpg"]


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
        rows.append(light(found.path, hashlib.sha256(bytes([number])).hexdigest(), number))
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


@pytest.fixture(scope="module")
def plan_of_a_volume() -> StorePlan:
    """Of three slices of a volume, one of which a table labels, an empty one and a bad file."""
    rng = np.random.default_rng(0)
    fingerprints = RowFile(96 * 96, np.uint8)
    fingerprints.append(rng.integers(0, 255, (3, 96 * 96)).astype(np.uint8))
    rows = [
        light("1.nii", f"{number:<064}", number) | {"sha256": 64 * "1", "frame": f"axial={number}"}
        for number in range(3)
    ]
    unstored = dict.fromkeys(["sample_id", "fingerprint", "part"])
    rows.append(rows[2] | unstored | {"frame": "axial=3", "reason": "blank", "detail": "black"})
    rows.append(rows[2] | unstored | {"path": "2.png", "frame": "", "reason": "empty file"})
    of_frame = {"axial=1": "glioma"}
    files = [
        SourceFile(label="notumor", label_of_frame=of_frame, file=FoundFile("1.nii", 1, 1)),
        SourceFile(label="notumor", file=FoundFile("2.png", 1, 1)),
    ]
    preprocess = {"subject": {"estimate": False}, "max_rejected_fraction": 0.5}
    settings = {"source": "/data", "split": {"mode": "official"}, "preprocess": preprocess}
    return plan_store(
        pa.Table.from_pylist(rows, schema=LIGHT),
        fingerprints,
        Listing(files, Counter(), []),
        Config.model_validate(settings),
        PreviousRecords.from_store(None),
    )


def test_a_frame_has_the_label_that_a_table_gives_it_alone(plan_of_a_volume: StorePlan) -> None:
    labels = {row["frame"]: row["label"] for row in plan_of_a_volume.rows.to_pylist()}
    assert labels == {"axial=0": "notumor", "axial=1": "glioma", "axial=2": "notumor"}


def test_what_was_rejected_is_recorded_with_the_files(plan_of_a_volume: StorePlan) -> None:
    rows = plan_of_a_volume.files.to_pylist()
    recorded = [tuple(row[name] for name in ("path", "frame", "reason", "part")) for row in rows]
    assert recorded == [
        *[("1.nii", f"axial={number}", None, "part.parquet") for number in range(3)],
        ("1.nii", "axial=3", "blank", None),
        ("2.png", "", "empty file", None),
    ]
    assert [row["detail"] for row in rows[3:]] == ["black", None]


def test_a_purge_needs_a_test_part_of_the_source() -> None:
    config = Config.model_validate({"split": {"mode": "purge"}, "source": "/data"})
    one, other = (SourceFile("train", file=FoundFile(name, 1, 1)) for name in ("a", "b"))
    with pytest.raises(
        DataError, match=r"split\.mode=purge needs a test split, but /data has none"
    ):
        official_splits([one, other], config)
    assert official_splits([one, replace(other, split="test")], config) == ["train", "test"]


def test_a_split_of_the_source_needs_training_slices_and_none_without() -> None:
    config = Config()
    one, other = (SourceFile("test", file=FoundFile(name, 1, 1)) for name in ("a", "b"))
    with pytest.raises(DataError, match="has a test split but no readable training slice"):
        official_splits([one, other], config)
    with pytest.raises(DataError, match="b has no split, which others have"):
        official_splits([one, replace(other, split=None)], config)
    nameless = [replace(file, split=None) for file in (one, other)]
    assert official_splits(nameless, config) is None


def test_slices_are_counted_by_split_and_class_in_order() -> None:
    index = pa.table({"split": ["test"] * 4, "label": ["b", None, "a", "b"]})
    counts = _count_by_split_and_class(index)
    assert counts == {"train": {}, "test": {"": 1, "a": 1, "b": 2}}
    assert list(counts["test"]) == ["", "a", "b"]
