"""Volumes and DICOM series through the whole of preprocessing, and no name in what it leaves."""

from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

from brainray.errors import DataError
from brainray.mri.phantom import make_series
from brainray.orchestration.preprocessing import driver
from brainray.orchestration.preprocessing.driver import preprocess
from brainray.orchestration.seen import training_slices
from brainray.orchestration.training.driver import train
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and nothing here looks at it."""
    monkeypatch.setattr(driver, "draw_figures", lambda *_: None)


PLANTED = {
    "PatientName": "Doeringer^Joanna",
    "PatientID": "MRN-4471-X",
    "PatientBirthDate": "19610203",
    "StudyDate": "20240517",
    "InstitutionName": "Saint Elsewhere",
    "AccessionNumber": "ACC-99881",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.7777",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.8888",
}


def write_volume(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    series = make_series("glioma", rng, num_slices=6, size=64)
    volume = np.stack([piece.image for piece in series], axis=2)[::-1].transpose(1, 0, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)


def write_dicom(path: Path, image: np.ndarray, **changes: str) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{int.from_bytes(path.name.encode()) % 10**9}")
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    for name, value in (PLANTED | changes).items():
        setattr(dataset, name, value)
    dataset.Modality = "MR"
    dataset.Rows, dataset.Columns = image.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelRepresentation = 0
    dataset.PixelData = np.ascontiguousarray(image).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def test_the_slices_of_a_volume_share_a_subject_and_no_group(tmp_path: Path) -> None:
    for number in range(4):
        write_volume(tmp_path / "s" / "glioma" / f"{number}.nii.gz", seed=number)
        write_volume(tmp_path / "s" / "notumor" / f"{number}.nii", seed=10 + number)
    config = tiny_config(tmp_path / "a", "name=mri", f"source={tmp_path / 's'}")
    store = preprocess(config)
    index = store.index().to_pandas()
    assert index["subject_source"].unique().tolist() == ["volume"]
    assert index["format"].unique().tolist() == ["NIfTI"]
    by_file = index.groupby("path")
    assert (by_file["subject_id"].nunique() == 1).all()
    assert index["subject_id"].nunique() == 8
    assert (by_file["duplicate_group_id"].nunique() == by_file.size()).all()
    assert (by_file["split"].nunique() == 1).all()
    assert index["sample_id"].is_unique
    assert (by_file.size() >= 5).all()
    seen = training_slices(store).to_pandas()  # a twin in a volume is named by its frame, too
    trained = index[index["split"] == "train"]
    assert set(zip(seen["path"], seen["frame"], strict=True)) == set(
        zip(trained["path"], trained["frame"], strict=True)
    )


def test_slices_of_a_volume_are_labelled_singly(tmp_path: Path) -> None:
    for number in range(4):
        write_volume(tmp_path / "s" / f"{number}.nii", seed=number)
    table = tmp_path / "labels.csv"

    def stored(*rows: str) -> pd.DataFrame:
        table.write_text("\n".join(["path,frame,label", *rows]))
        arguments = ("name=mri", f"source={tmp_path / 's'}", f"labels={table}")
        store = preprocess(tiny_config(tmp_path / "a", *arguments))
        assert store.manifest.num_files_decoded == (4 if len(rows) == 1 else 0)
        return store.index().to_pandas().set_index(["path", "frame"])

    first = stored("0.nii,,notumor")
    assert first["label"].dropna().unique().tolist() == ["notumor"]
    frames = first.loc["0.nii"].index.tolist()
    rows = [f"{number}.nii,{frames[2]},glioma" for number in range(3)]
    after = stored("0.nii,,notumor", *rows, "3.nii,,notumor")
    assert after["label"].groupby("path").value_counts().unstack(fill_value=0).to_dict() == {
        "glioma": {"0.nii": 1, "1.nii": 1, "2.nii": 1, "3.nii": 0},
        "notumor": {"0.nii": len(frames) - 1, "1.nii": 0, "2.nii": 0, "3.nii": len(frames)},
    }
    frame_labels = after.xs(frames[2], level="frame")["label"].sort_index().tolist()
    assert frame_labels == ["glioma", "glioma", "glioma", "notumor"]
    with pytest.raises(DataError, match=r"frame 'axial=2' of '1\.nii'.*such as 'volume=0/axial="):
        stored("0.nii,,notumor", "1.nii,axial=2,glioma")


def write_patients(source: Path, number: int) -> None:
    """Two slices of each, in two classes, and a broken file."""
    rng = np.random.default_rng(0)
    for subject in range(number):
        images = make_series("notumor", rng, num_slices=2, size=64)
        for index, piece in enumerate(images):
            label = "glioma" if subject % 2 else "notumor"
            path = source / label / f"IM{subject}{index}"
            write_dicom(path, piece.image, PatientID=f"{PLANTED['PatientID']}{subject}")
    broken = source / "glioma" / "broken.dcm"
    write_dicom(broken, images[0].image)
    broken.write_bytes(broken.read_bytes()[:-500])


def assert_nothing_planted(content: bytes, where: object) -> None:
    for name, planted in PLANTED.items():
        for part in planted.encode().split(b"^"):
            assert part not in content, (name, where)


def content_of(path: Path) -> bytes:
    """The bytes of a file; also the values of a table, whose columns are compressed."""
    table = str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else ""
    return path.read_bytes() + table.encode()


def test_no_name_number_or_date_is_left_anywhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_patients(tmp_path / "s", 6)
    store = preprocess(tiny_config(tmp_path / "a", "name=mri", f"source={tmp_path / 's'}"))
    index = store.index().to_pandas()
    assert len(index) == 12
    assert index["subject_id"].nunique() == 6
    assert_nothing_planted("".join(capfd.readouterr()).encode(), "the log")
    files = [path for path in (tmp_path / "a" / "datasets").rglob("*") if path.is_file()]
    assert any(b"IM00" in content_of(path) for path in files)
    for path in files:
        assert_nothing_planted(content_of(path), path)


@pytest.mark.slow
def test_none_is_left_in_a_run_its_report_and_mlflow(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_patients(tmp_path / "s", 20)
    storage = tmp_path / "a"
    preprocess(tiny_config(storage, "name=mri", f"source={tmp_path / 's'}"))
    settings = ("name=run", "dataset=mri", "train.num_epochs=1", "split.labelled_fraction=1")
    trained = train(tiny_config(storage, *settings))
    assert trained.mlflow_run_id is not None
    assert_nothing_planted("".join(capfd.readouterr()).encode(), "the log")
    files = [path for path in storage.rglob("*") if path.is_file()]
    names = {str(path.relative_to(storage)) for path in files}
    assert {"mlflow.db", "runs/run/report.html", "runs/run/seen.parquet"} <= names
    assert any(name.startswith("mlartifacts/") and name.endswith("report.html") for name in names)
    assert b"IM00" in content_of(storage / "runs" / "run" / "seen.parquet")
    for path in files:
        assert_nothing_planted(content_of(path), path)


def test_new_files_of_a_patient_are_not_hashed_with_another_salt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = make_series("notumor", np.random.default_rng(0), num_slices=3, size=64)
    source = tmp_path / "s"

    def add(number: int) -> None:
        image = slices[number].image
        for label in ("a", "b"):
            write_dicom(source / label / f"{number}.dcm", image, PatientID=f"{label}-1")
            image = image[:, ::-1].copy()

    config = tiny_config(tmp_path, "name=mri", f"source={source}")
    monkeypatch.setenv("BRAINRAY_SALT", "a secret of sixteen letters")
    add(0)
    add(1)
    before = preprocess(config)
    add(2)
    monkeypatch.setenv("BRAINRAY_SALT", "another one of sixteen letters")
    with pytest.raises(DataError, match=r"a different salt from that of BRAINRAY_SALT or storage"):
        preprocess(config)
    monkeypatch.setenv("BRAINRAY_SALT", "a secret of sixteen letters")
    assert (
        before.index()["subject_id"]
        .unique()
        .sort()
        .equals(preprocess(config).index()["subject_id"].unique().sort())
    )


def test_the_salt_is_kept_outside_the_stores_and_rules_the_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = make_series("notumor", np.random.default_rng(0), num_slices=2, size=64)
    for label in ("a", "b"):
        for number, slice_ in enumerate(piece):
            write_dicom(
                tmp_path / "s" / label / f"{number}.dcm",
                np.roll(slice_.image, 3 if label == "a" else 0),
                PatientID=f"{label}{number}",
            )

    def subjects(storage: Path) -> set[str]:
        store = preprocess(tiny_config(storage, "name=mri", f"source={tmp_path / 's'}"))
        return set(store.index()["subject_id"].to_pylist())

    monkeypatch.setenv("BRAINRAY_SALT", "a secret of sixteen letters")
    one = subjects(tmp_path / "a")
    assert subjects(tmp_path / "b") == one
    monkeypatch.delenv("BRAINRAY_SALT")
    assert subjects(tmp_path / "c").isdisjoint(one)
    assert (tmp_path / "c" / ".subject-salt").stat().st_mode & 0o077 == 0
    assert not list((tmp_path / "c" / "datasets" / "mri").rglob("*salt*"))
