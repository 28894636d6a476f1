"""Preprocessing on a real Ray cluster: what is stored, removed, rejected and refused."""

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from brainray.errors import ConfigError, DataError
from brainray.mri import decode, intracranial, subjects
from brainray.mri.decode import decode_file
from brainray.mri.resize import stretch
from brainray.mri.skull_strip import apply_mask, otsu_mask
from brainray.orchestration.preprocessing import driver
from brainray.orchestration.preprocessing.driver import (
    _note_many_classes,
    _previous_store,
    preprocess,
)
from brainray.orchestration.preprocessing.slice_rows import decode_options
from brainray.orchestration.preprocessing.source import list_source
from brainray.orchestration.store import ImageStore, read_images
from brainray.schema import IMAGE_STORE
from brainray.storage import Folder
from tests.conftest import logged, tiny_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def store(
    phantoms: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> ImageStore:
    storage = tmp_path_factory.mktemp("storage")
    return preprocess(tiny_config(storage, "name=mri", f"source={phantoms}"))


def test_the_store_is_readable_by_plain_pyarrow(store: ImageStore, phantoms: Path) -> None:
    assert store.folder.local_path is not None
    table = pq.read_table(store.folder.local_path / "images")
    assert table.schema.equals(IMAGE_STORE)
    row = table.filter(table["path"].to_numpy() == table["path"][0].as_py()).to_pylist()[0]
    content = (phantoms / row["path"]).read_bytes()
    options = decode_options(store.manifest.preprocess, b"any salt")
    image = decode_file(content, options)[0].image
    expected = stretch(apply_mask(image, otsu_mask(image)), 32)
    stored = np.frombuffer(row["image"], np.uint8).reshape(row["height"], row["width"])
    np.testing.assert_array_equal(stored, expected)
    assert row["num_bytes"] == len(content)


def test_copies_leave_training_but_not_the_test_set(store: ImageStore) -> None:
    counts = store.manifest.num_slices
    assert counts["train"] == dict.fromkeys(["glioma", "meningioma", "notumor", "pituitary"], 14)
    assert counts["test"]["glioma"] == 5
    duplicates = store.folder.read_table("duplicates.parquet").to_pylist()
    removed = [row["path"] for row in duplicates if row["removed"]]
    assert len(removed) == 1
    assert {row["level"] for row in duplicates} == {"exact"}


def test_leakage_names_the_copy_across_the_split(store: ImageStore) -> None:
    leakage = store.folder.read_json("leakage.json")
    assert leakage["num_test"]["all"] == 17
    assert leakage["num_test"]["clean"] == 16
    assert leakage["num_test"]["strict"] <= 16
    (pair,) = leakage["across_splits"]["exact"]
    assert pair["path"] == "Testing/glioma/copied.jpg"
    assert pair["twin"].startswith("Training/glioma/")
    (inside,) = leakage["within_train"]["exact"]
    assert {Path(inside["path"]).name, Path(inside["twin"]).name} >= {"copied.jpg"}
    table = store.folder.read_bytes("leakage.md").decode()
    assert "| exact" in table
    assert "| strict" in table


def test_statistics_are_those_of_the_stored_training_pixels(store: ImageStore) -> None:
    assert store.folder.local_path is not None
    table = pq.read_table(store.folder.local_path / "images").to_pylist()
    pixels = np.concatenate(
        [np.frombuffer(row["image"], np.uint8) for row in table if row["split"] == "train"]
    )
    assert abs(store.manifest.pixel_mean - pixels.mean() / 255) < 1e-9
    assert abs(store.manifest.pixel_std - pixels.std() / 255) < 1e-9


def test_images_come_in_the_requested_order(store: ImageStore) -> None:
    ids = store.index().to_pandas().query("split == 'train'")["sample_id"].tolist()
    forward = read_images(store.folder, ids, "train", 16)
    np.testing.assert_array_equal(read_images(store.folder, ids[::-1], "train", 16), forward[::-1])
    assert forward.shape == (56, 1, 16, 16)
    with pytest.raises(DataError, match="1 slices in the index are missing"):
        read_images(store.folder, ["0" * 32], "train", 16)


def test_figures_are_drawn(store: ImageStore) -> None:
    assert (store.folder / "figures").names() == [
        "class_distribution.png",
        "contact_sheet.png",
        "leakage_pairs.png",
        "skull_strip.png",
    ]


def test_an_equal_store_is_reused_and_other_settings_are_refused(
    store: ImageStore, phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert store.folder.local_path is not None
    storage = store.folder.local_path.parents[1]
    again = preprocess(tiny_config(storage, "name=mri", f"source={phantoms}"))
    lines = logged(capsys)
    assert again.manifest == store.manifest
    assert "reusing it" in lines[0]
    with pytest.raises(ConfigError, match=r"preprocess\.skull_strip: otsu here, none requested"):
        preprocess(
            tiny_config(storage, "name=mri", f"source={phantoms}", "preprocess.skull_strip=none")
        )


def test_a_store_of_slices_that_are_made_otherwise_now_is_refused(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "draw_figures", lambda *_: None)
    config = tiny_config(
        tmp_path, "name=brains", f"source={phantoms}", "preprocess.skull_strip=intracranial"
    )
    preprocess(config)
    monkeypatch.setattr(intracranial, "VERSION", intracranial.VERSION + 1)
    with pytest.raises(ConfigError, match=r"intracranial_version: 3 here, 4 requested"):
        preprocess(config)
    monkeypatch.setattr(intracranial, "VERSION", intracranial.VERSION - 1)
    monkeypatch.setattr(decode, "VERSION", decode.VERSION + 1)
    here, there = decode.VERSION - 1, decode.VERSION
    with pytest.raises(ConfigError, match=rf"decode_version: {here} here, {there} requested"):
        preprocess(config)


def test_a_store_whose_subjects_are_estimated_otherwise_now_is_reused_but_not_updated(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "draw_figures", lambda *_: None)
    source = tmp_path / "phantoms"
    shutil.copytree(phantoms, source)
    config = tiny_config(tmp_path, "name=mri", f"source={source}", "preprocess.skull_strip=none")
    made = preprocess(config)
    monkeypatch.setattr(subjects, "VERSION", subjects.VERSION + 1)
    assert preprocess(config).manifest == made.manifest
    (source / "Testing/glioma/copied.jpg").unlink()
    with pytest.raises(ConfigError, match=r"another version of brainray estimated the subjects"):
        preprocess(config)


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "brainray-image-store/1"}')
    with pytest.raises(DataError, match="another version of brainray"):
        ImageStore.open(Folder(tmp_path))


def test_a_folder_that_is_no_store_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    target = Folder(tmp_path / "mri")
    assert _previous_store(target) is None
    target.write_bytes("notes.txt", b"somebody's")
    with pytest.raises(DataError, match="exists but is not an image store"):
        _previous_store(target)
    assert target.read_bytes("notes.txt") == b"somebody's"


def test_many_class_folders_may_be_patients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(11):
        (tmp_path / f"sub-{number:02d}").mkdir()
        (tmp_path / f"sub-{number:02d}" / "1.png").touch()
    _note_many_classes(list_source(Folder(tmp_path), None, {}))
    output = capsys.readouterr().out
    assert "note: 11 folders are read as classes, from 'sub-00' to 'sub-10'; if they are" in output
    _note_many_classes(list_source(Folder(tmp_path), None, {"sub-03": None}))
    assert capsys.readouterr().out == ""


def test_bad_files_are_recorded_and_the_rest_goes_on(phantoms: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(phantoms, source)
    good = next((source / "Training" / "glioma").iterdir()).read_bytes()
    bad = {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"not an image at all", "not an image"),
        "truncated.jpg": (good[: len(good) // 2], "corrupt or truncated"),
    }
    for name, (content, _) in bad.items():
        (source / "Training" / "glioma" / name).write_bytes(content)
    folder = source / "Training" / "glioma"
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    (folder / "again").symlink_to(source / "Training")
    with open(os.fsencode(folder) + b"/\xff.jpg", "wb") as stream:
        stream.write(good)
    (folder / "two\nlines.jpg").write_bytes((folder / "copied.jpg").read_bytes())
    made = preprocess(tiny_config(tmp_path / "storage", "name=mri", f"source={source}"))
    rejected = {
        Path(row["path"]).name: row["reason"]
        for row in made.folder.read_table("rejected.parquet").to_pylist()
    }
    assert rejected == {name: reason for name, (_, reason) in bad.items()} | {
        "gone.jpg": "unreadable file",
        "\\xff.jpg": "file name is not UTF-8",
    }
    assert made.manifest.num_rejected == 5
    removed = made.folder.read_table("duplicates.parquet").to_pylist()
    assert "Training/glioma/two\nlines.jpg" in {row["path"] for row in removed}
    assert made.manifest.num_slices["train"]["glioma"] == 14


def test_too_many_bad_files_stop_the_job_and_leave_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source" / "a"
    source.mkdir(parents=True)
    for number in range(5):
        (source / f"{number}.jpg").write_bytes(b"text")
    with pytest.raises(DataError, match=r"none of the 5 files .* not an image \(5; no JPEG"):
        preprocess(tiny_config(tmp_path / "storage", "name=mri", f"source={source.parent}"))
    assert list((tmp_path / "storage" / "datasets").iterdir()) == []


def test_a_source_without_splits_is_split_by_group(phantoms: Path, tmp_path: Path) -> None:
    made = preprocess(
        tiny_config(tmp_path, "name=mri", f"source={phantoms / 'Training'}", "split.seed=1")
    )
    index = made.index().to_pandas()
    shares = index.groupby("label")["split"].apply(lambda split: (split == "test").mean())
    assert shares.between(0.15, 0.3).all()
    assert index.groupby("duplicate_group_id")["split"].nunique().max() == 1
    assert index.groupby("split_group_id")["split"].nunique().max() == 1
    assert made.folder.read_json("leakage.json")["across_splits"]["near"] == []


def test_a_test_class_that_training_lacks_is_named(phantoms: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(phantoms, source)
    (source / "Testing" / "glioma").rename(source / "Testing" / "glioma_tumor")
    with pytest.raises(DataError, match=r"--set classes\.map\.glioma_tumor=NAME"):
        preprocess(tiny_config(tmp_path / "storage", "name=mri", f"source={source}"))
    renamed = tiny_config(
        tmp_path / "storage", "name=mri", f"source={source}", "classes.map.glioma_tumor=glioma"
    )
    assert preprocess(renamed).manifest.num_slices["test"]["glioma"] == 5


def test_purging_drops_the_training_twins_of_test_slices(phantoms: Path, tmp_path: Path) -> None:
    made = preprocess(tiny_config(tmp_path, "name=mri", f"source={phantoms}", "split.mode=purge"))
    counts = made.manifest.num_slices
    assert counts["train"]["glioma"] == 13
    assert counts["test"]["glioma"] == 5
    assert made.folder.read_json("leakage.json")["num_test"]["clean"] == 17
    duplicates = made.folder.read_table("duplicates.parquet").to_pylist()
    assert sum(row["removed"] for row in duplicates) == 2


@pytest.mark.parametrize("turn", [None, cv2.ROTATE_90_CLOCKWISE])
def test_copies_with_another_label_are_left_unlabelled_and_listed(
    phantoms: Path, tmp_path: Path, turn: int | None
) -> None:
    source = tmp_path / "source"
    shutil.copytree(phantoms, source)
    original = source / "Training" / "glioma" / "copied.jpg"
    other = source / "Training" / "notumor" / "conflicting.png"
    if turn is None:
        shutil.copy(original, other)
    else:
        cv2.imwrite(str(other), cv2.rotate(cv2.imread(str(original)), turn))
    made = preprocess(tiny_config(tmp_path / "storage", "name=mri", f"source={source}"))
    conflicts = made.folder.read_json("leakage.json")["label_conflicts"]
    assert {row["label"] for row in conflicts} == {"glioma", "notumor"}
    index = made.index().to_pandas()
    listed = index[index["path"].isin([row["path"] for row in conflicts])]
    assert (listed["split"] == "train").any()
    assert listed[listed["split"] == "train"]["label"].isna().all()
    assert listed[listed["split"] == "test"]["label"].notna().all()
    # Only upright ones are one group of copies, but validation and labelled slices share neither.
    assert listed["duplicate_group_id"].nunique() == (1 if turn is None else 2)
    assert listed["kin_group_id"].nunique() == 1
