"""Files that change or vanish while they are read; what is stored of a slice."""

import os
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest

from brainray.config import PreprocessConfig
from brainray.errors import DataError
from brainray.mri.identity import content_hash
from brainray.mri.phantom import make_slice
from brainray.mri.resize import min_max
from brainray.mri.slices import RejectedImage, subject_hash
from brainray.orchestration.preprocessing.slice_rows import (
    NO_CLASS_TO_SCORE,
    Subject,
    decode_options,
    decode_to_predict,
    named_subject,
    preprocess_file,
    read_file,
    rejected_row,
    strip,
)
from brainray.orchestration.preprocessing.source import FoundFile, SourceFile, list_source
from brainray.storage import Folder


def test_a_file_that_changes_or_vanishes_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"first")
    (listed,) = list_source(Folder(tmp_path), None, {}).files
    assert read_file(Folder(tmp_path), listed.file) == b"first"
    path.write_bytes(b"longer than before")
    with pytest.raises(RejectedImage, match="changed while being read"):
        read_file(Folder(tmp_path), listed.file)
    path.write_bytes(b"other")
    os.utime(path, (1, 1))
    with pytest.raises(RejectedImage, match="changed while being read"):
        read_file(Folder(tmp_path), listed.file)
    path.unlink()
    with pytest.raises(RejectedImage, match="unreadable file"):
        read_file(Folder(tmp_path), listed.file)
    with pytest.raises(DataError, match=r"absent does not exist on node .*available on every node"):
        read_file(Folder(tmp_path / "absent"), listed.file)


def test_slices_of_a_bad_volume_are_reported_as_bad_and_not_as_without_a_class() -> None:
    side = np.linspace(-1.0, 1.0, 40)
    ball = np.add.outer(np.add.outer(side**2, side**2), side**2) < 0.8
    good = np.where(ball, 500.0 + 100.0 * side[:, None, None], 0.0).astype(np.float32)
    bad = np.full_like(good, np.nan)
    content = bytes(nibabel.Nifti1Image(np.stack([bad, good], axis=3), np.eye(4)).to_bytes())
    names = {"volume=0/axial=20": "glioma", "volume=1/axial=20": "notumor"}
    source_file = SourceFile(file=FoundFile("1.nii", len(content), 1), label_of_frame=names)
    rows = decode_to_predict(source_file, lambda: content, PreprocessConfig(image_size=32), b"salt")
    by_frame = {row["frame"]: (row.get("reason"), row["label"]) for row in rows}
    assert by_frame["volume=0"] == ("non-finite pixels", None)
    assert by_frame["volume=1/axial=20"] == (None, "notumor")
    assert by_frame["volume=1/axial=19"] == (NO_CLASS_TO_SCORE, None)


def test_a_file_of_labelled_slices_that_cannot_be_read_is_reported_as_such() -> None:
    def unreadable() -> bytes:
        raise RejectedImage("unreadable file")

    names = {"volume=0/axial=20": "glioma"}
    source_file = SourceFile(file=FoundFile("1.nii", 7, 1), label_of_frame=names)
    (row,) = decode_to_predict(source_file, unreadable, PreprocessConfig(), b"salt")
    assert (row["reason"], row["label"]) == ("unreadable file", None)


def test_what_is_known_of_a_rejected_file_is_recorded() -> None:
    file, why = FoundFile("a.jpg", 7, 5), RejectedImage("not an image", "a text")
    unread, read = rejected_row(file, None, why), rejected_row(file, b"abc", why)
    assert (unread["num_bytes"], unread["sha256"]) == (7, None)
    assert (read["num_bytes"], read["sha256"]) == (3, content_hash(b"abc"))
    for row in (unread, read):
        assert (row["path"], row["mtime_ns"]) == ("a.jpg", 5)
        assert (row["reason"], row["detail"]) == ("not an image", "a text")


def test_a_table_names_a_subject_whatever_the_header_says() -> None:
    by_table = Subject(subject_hash("patient", "anna", b"salt"), "table")
    for header in (None, "12ab"):
        assert named_subject("anna", header, "0", b"salt") == by_table
    assert named_subject(None, "12ab", "0", b"salt") == Subject("12ab", "header")
    assert named_subject(None, None, "0", b"salt") == Subject()


def test_volumes_are_windowed_and_sliced_as_configured() -> None:
    volume = {"window_low": 1.5, "window_high": 98.0, "axis": "coronal", "min_foreground": 0.2}
    options = decode_options(PreprocessConfig.model_validate({"volume": volume}), b"salt")
    assert options.window_percentiles == (1.5, 98.0)
    assert (options.axis, options.min_foreground) == ("coronal", 0.2)


def test_the_original_size_is_recorded_and_what_a_frame_leaves_blank_is_rejected() -> None:
    image = np.zeros((120, 200), np.uint8)
    image[20:100, 50:150] = np.random.default_rng(0).integers(90, 160, (80, 100))
    page = np.full((120, 200), 255, np.uint8)
    page[40:80, 90:92] = 0
    page[0, :16] = np.arange(240, 256)  # with fewer greys it would be no scan

    def row(image: np.ndarray) -> dict[str, object]:
        content = cv2.imencode(".png", image)[1].tobytes()
        config = PreprocessConfig(image_size=64, frame="remove")
        (found,) = preprocess_file(content, FoundFile("", 0, 0), config, b"salt")
        return found

    stored = row(image)
    assert (stored["original_height"], stored["original_width"]) == (120, 200)
    assert (stored["height"], stored["width"]) == (64, 64)
    assert row(page)["reason"] == "blank"


def test_a_known_problem_is_reported_without_reading(tmp_path: Path) -> None:
    with pytest.raises(RejectedImage, match="not UTF-8"):
        read_file(Folder(tmp_path), FoundFile("a", 0, 0, "file name is not UTF-8"))


@pytest.mark.parametrize("skull_strip", ["none", "otsu"])
def test_a_cropped_head_fills_the_slice_and_keeps_its_fingerprint(skull_strip: str) -> None:
    # Noise in a frame of 100 x 50 pixels: a slice without contrast would be rejected.
    image = np.zeros((200, 200), np.uint8)
    image[40:140, 60:110] = np.random.default_rng(0).integers(90, 160, (100, 50))
    content = cv2.imencode(".png", image)[1].tobytes()

    def stored(**settings: str) -> tuple[np.ndarray, bytes]:
        config = PreprocessConfig.model_validate(
            {"image_size": 64, "skull_strip": skull_strip, "resize": "letterbox"} | settings
        )
        (row,) = preprocess_file(content, FoundFile("", 0, 0), config, b"salt")
        return np.frombuffer(row["image"], np.uint8).reshape(64, 64), row["thumbnail"]

    whole, fingerprint = stored()
    cropped, fingerprint_of_cropped = stored(crop="foreground")
    assert cv2.boundingRect(whole)[3] <= 36  # 100 of 200 rows, and what the mask adds
    assert cv2.boundingRect(cropped)[3] >= 60
    assert abs(cv2.boundingRect(cropped)[2] - 32) <= 6  # half as wide as high, as the head is
    assert fingerprint == fingerprint_of_cropped


def test_a_white_frame_goes_where_it_is_asked_for() -> None:
    image = np.zeros((200, 200), np.uint8)
    image[40:160, 50:150] = np.random.default_rng(0).integers(90, 160, (120, 100))
    content = cv2.imencode(".png", np.pad(image, 20, constant_values=255))[1].tobytes()

    def stored(frame: str) -> tuple[np.ndarray, bytes]:
        config = PreprocessConfig.model_validate({"image_size": 240, "frame": frame})
        (row,) = preprocess_file(content, FoundFile("", 0, 0), config, b"salt")
        return np.frombuffer(row["image"], np.uint8).reshape(240, 240), row["thumbnail"]

    kept, fingerprint = stored("keep")
    assert kept[120, 120] == 0
    removed, fingerprint_of_removed = stored("remove")
    np.testing.assert_array_equal(removed[70:170, 80:160], image[50:150, 60:140])
    assert removed[0].max() == 0
    assert fingerprint == fingerprint_of_removed


def test_a_brain_mask_that_is_not_trusted_is_not_used() -> None:
    phantom = make_slice("glioma", np.random.default_rng(0))
    config = PreprocessConfig(skull_strip="intracranial")
    assert strip(phantom.image, config).method == "intracranial"
    without_skull = np.where(phantom.brain_mask, phantom.image, np.uint8(0))
    assert strip(without_skull, config).method == "otsu"


def test_intensities_are_stored_as_configured_and_leave_the_fingerprint() -> None:
    image = np.zeros((80, 80), np.uint8)
    image[10:70, 10:70] = np.random.default_rng(0).integers(40, 160, (60, 60))
    content = cv2.imencode(".png", image)[1].tobytes()

    def stored(intensity: str) -> tuple[np.ndarray, bytes]:
        settings = {"image_size": 80, "skull_strip": "none", "intensity": intensity}
        config = PreprocessConfig.model_validate(settings)
        (row,) = preprocess_file(content, FoundFile("", 0, 0), config, b"salt")
        return np.frombuffer(row["image"], np.uint8).reshape(80, 80), row["thumbnail"]

    for intensity, expected in (("as_is", image), ("min_max", min_max(image))):
        found, fingerprint = stored(intensity)
        np.testing.assert_array_equal(found, expected)
        assert fingerprint == stored("as_is")[1]
