"""Prediction for a folder as users have them: mixed formats, broken files, cut and resumed."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import torch

from brainray import layout
from brainray.config import Config, PreprocessConfig
from brainray.engine.state import load_checkpoint
from brainray.errors import CheckpointError, ConfigError, DataError
from brainray.mri import decode, intracranial
from brainray.mri.intracranial import VERSION
from brainray.orchestration.job import JobResult
from brainray.orchestration.prediction import predict as predict_module
from brainray.orchestration.prediction.inference import (
    Predictor,
    _Embedder,
    find_predictor,
    predicted_blocks,
)
from brainray.orchestration.prediction.predict import _check_or_write_settings, _finish, predict
from brainray.orchestration.preprocessing.slice_rows import UNREADABLE
from brainray.orchestration.training.driver import TrainedRun
from brainray.schema import PREDICTED_FILES
from brainray.storage import Folder
from tests.conftest import logged, tiny_config
from tests.mri.test_nifti import ball, make_nifti

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def inbox(phantoms: Path, trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slices without class folders, one of training, a text file and an empty one named .jpg."""
    folder = tmp_path_factory.mktemp("inbox")
    for number, path in enumerate(sorted((phantoms / "Testing").rglob("*.jpg"))[:6]):
        (folder / f"scan{number}.jpg").write_bytes(path.read_bytes())
    seen = trained.run.folder.read_table("seen.parquet").to_pylist()
    learned = next(row["path"] for row in seen if row["role"] == "labelled")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "known.jpg").write_bytes((phantoms / learned).read_bytes())
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("ignored")
    return folder


def config_of(trained: TrainedRun, source: Path, *overrides: str) -> Config:
    storage = Path(str(trained.run.folder)).parents[1]
    return tiny_config(storage, "run=two-ranks", f"source={source}", *overrides)


blocks_of_prediction: list[ray.data.Dataset] = []


@pytest.fixture(scope="module")
def prediction(trained: TrainedRun, inbox: Path) -> JobResult:
    def recorded(*arguments: Any) -> ray.data.Dataset:
        blocks_of_prediction.append(predicted_blocks(*arguments))
        return blocks_of_prediction[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_module, "predicted_blocks", recorded)
        return predict(config_of(trained, inbox, "name=inbox"))


def rows_of(prediction: JobResult) -> dict[str, dict[str, Any]]:
    parts = [pq.read_table(path) for path in sorted(Path(prediction.out).glob("part-*"))]
    rows = pa.concat_tables(parts).to_pylist()
    assert len({(row["path"], row["frame"]) for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


def test_a_part_names_the_classes_in_the_order_of_its_probabilities(
    trained: TrainedRun, prediction: JobResult
) -> None:
    for path in Path(prediction.out).glob("part-*"):
        classes = json.loads(pq.read_schema(path).metadata[b"classes"])
        assert classes == trained.run.record.classes
        for row in pq.read_table(path).to_pylist():
            assert row["class"] is None or row["class"] == classes[np.argmax(row["probabilities"])]


def test_files_are_decoded_apart_from_the_actor_that_embeds(prediction: JobResult) -> None:
    stages = blocks_of_prediction[-1].stats()
    assert "MapBatches(decode_files)" in stages
    assert "MapBatches(_Embedder)" in stages
    assert "MapBatches(decode_files)->MapBatches(_Embedder)" not in stages


def test_an_actor_does_not_predict_with_another_epoch_than_the_rest(trained: TrainedRun) -> None:
    best = trained.run.folder / "best"
    chosen = int(trained.metrics["chosen_epoch"])
    cpu = torch.device("cpu")
    assert _Embedder(best, chosen, "fp32", cpu).model.checkpoint.epoch == chosen
    with pytest.raises(CheckpointError, match=f"now contains epoch {chosen}, not 99 as when"):
        _ = _Embedder(best, 99, "fp32", cpu).model  # another has taken its place since


def test_every_file_has_a_row(prediction: JobResult, trained: TrainedRun) -> None:
    rows = rows_of(prediction)
    assert len(rows) == 9
    assert {path for path, row in rows.items() if row["reason"]} == {"text.jpg", "empty.jpg"}
    for row in rows.values():
        assert set(row) == set(PREDICTED_FILES.names)
        if row["reason"] is not None:
            assert row["class"] is None
            continue
        assert row["class"] in trained.run.record.classes
        assert np.isclose(sum(row["probabilities"]), 1, atol=1e-5)
        assert np.isclose(sum(row["responsibilities"]), 1, atol=1e-5)
        assert np.isclose(row["confidence"], max(row["probabilities"]))
        assert 0 <= row["outlier_score"] <= 1
        assert len(row["nearest"]) == 5
        assert row["nearest_distance"] == sorted(row["nearest_distance"])
    assert prediction.metrics["num_predicted"] == 7
    assert prediction.metrics["num_rejected"] == 2


def test_the_table_for_spreadsheets_has_every_row(prediction: JobResult) -> None:
    folder = Path(prediction.out)
    with (folder / "_predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert sorted(row["path"] for row in table) == sorted(rows_of(prediction))
    for row in table:
        predicted = rows_of(prediction)[row["path"]]
        for name in ("class", "cluster_class", "reason"):
            assert (row[name] or None) == predicted[name]
        if not row["reason"]:
            assert np.isclose(float(row["confidence"]), predicted["confidence"])
    assert pq.read_table(folder).num_rows == len(table)  # as one Parquet data set


def test_a_slice_of_the_training_set_is_its_own_nearest(prediction: JobResult) -> None:
    row = rows_of(prediction)["deep/er/known.jpg"]
    assert row["nearest"][0] == row["sample_id"]
    assert row["nearest_distance"][0] < 1e-2


def test_raw_files_are_predicted_as_the_store_was_in_training(
    prediction: JobResult, trained: TrainedRun
) -> None:
    """The tests of training compare it with an evaluation."""
    chosen = int(trained.metrics["chosen_epoch"])
    in_training = trained.run.folder.read_table(layout.predictions_file(chosen)).to_pylist()
    by_id = {row["sample_id"]: row for row in in_training}
    compared = 0
    for row in rows_of(prediction).values():
        if row["sample_id"] in by_id:
            expected = by_id[row["sample_id"]]
            np.testing.assert_allclose(row["probabilities"], expected["probabilities"], atol=1e-4)
            assert row["cluster"] == expected["cluster"]
            compared += 1
    assert compared >= 6


def test_a_run_on_slices_that_would_be_made_otherwise_now_does_not_predict(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(str(trained.run.folder), tmp_path / "runs" / "brains")
    run = Folder(tmp_path) / "runs" / "brains"
    config = tiny_config(tmp_path, "run=brains")
    info = run.read_json("run.json")
    assert info["versions"] == {"decode_version": decode.VERSION}
    info["preprocess"]["skull_strip"] = "intracranial"
    run.write_json("run.json", info)
    with pytest.raises(DataError, match=r"intracranial_version: unset here, \d+ requested"):
        find_predictor(config)
    versions = info["versions"] | {"intracranial_version": VERSION}
    run.write_json("run.json", info | {"versions": versions})
    assert find_predictor(config).preprocess.skull_strip == "intracranial"
    monkeypatch.setattr(intracranial, "VERSION", VERSION + 1)
    with pytest.raises(DataError, match="preprocess and train again"):
        find_predictor(config)


def test_training_slices_of_another_epoch_are_not_compared_with(
    trained: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = trained.run.folder / "best"
    predictor = Predictor(Folder(tmp_path), trained.run, load_checkpoint(best), PreprocessConfig())
    fitted = best.read_table("fitted.parquet")
    predictor.folder.write_table("fitted.parquet", fitted)
    assert predictor.fitted() is not None
    other = fitted.replace_schema_metadata({"epoch": str(predictor.checkpoint.epoch + 1)})
    predictor.folder.write_table("fitted.parquet", other)
    assert predictor.fitted() is None
    assert "its training was interrupted, or has gone on meanwhile" in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_replaced_or_could_not_be_read_is_predicted_again(
    trained: TrainedRun,
    inbox: Path,
    prediction: JobResult,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "inbox"
    shutil.copytree(inbox, source)
    first = Path(prediction.out)
    again = first.with_name("again")
    shutil.copytree(first, again)
    settings = json.loads((again / "_settings.json").read_text()) | {"source": str(source)}
    (again / "_settings.json").write_text(json.dumps(settings))
    part = again / "part-000000.parquet"
    rows = pq.read_table(part).to_pylist()
    for row in rows:
        if row["path"] in {"scan4.jpg", "scan5.jpg"}:  # as a mount that is away leaves them
            kept = {"path", "frame", "num_bytes", "mtime_ns"}
            row |= dict.fromkeys(set(row) - kept) | {"reason": UNREADABLE}
    pq.write_table(pa.Table.from_pylist(rows, PREDICTED_FILES), part)
    os.utime(source / "scan2.jpg", ns=(0, 10**18))  # another file of the same size, it may be
    (source / "scan1.jpg").write_bytes((source / "deep" / "er" / "known.jpg").read_bytes())
    (source / "scan3.jpg").unlink()

    after = predict(config_of(trained, source, "name=again"))
    lines = logged(capsys)

    assert "; 5 are done; 2 were replaced and are predicted again" in lines[0]
    rows_after, rows_before = rows_of(after), rows_of(prediction)
    assert rows_after["scan1.jpg"]["sample_id"] == rows_after["deep/er/known.jpg"]["sample_id"]
    assert rows_after["scan2.jpg"]["mtime_ns"] == 10**18
    for path in ("scan3.jpg", "scan4.jpg", "scan5.jpg"):
        assert rows_after[path]["class"] == rows_before[path]["class"] is not None
    assert pq.read_table(after.out).num_rows == len(rows_after)  # as others read it
    assert predict(config_of(trained, source, "name=again")).metrics == after.metrics


def test_files_slices_and_classes_are_counted(tmp_path: Path) -> None:
    parts = (
        [("a.nii", "glioma", None), ("a.nii", "notumor", None), ("a.nii", None, "blank")],
        [("b.png", "glioma", None), ("c.png", None, "empty file")],
    )
    for number, rows in enumerate(parts):
        part = [{"path": path, "class": name, "reason": why} for path, name, why in rows]
        table = pa.Table.from_pylist(part, schema=PREDICTED_FILES)
        Folder(tmp_path).write_table(layout.PART.format(number=number), table)
    assert _finish(Folder(tmp_path)) == {
        "num_files": 3,
        "num_predicted": 3,
        "num_rejected": 2,
        "num_predicted/glioma": 2,
        "num_predicted/notumor": 1,
    }


@pytest.mark.slow
def test_the_same_name_goes_on_with_what_is_missing(
    trained: TrainedRun, inbox: Path, prediction: JobResult, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(trained, inbox, "name=cut")
    whole = predict(config)
    folder = Path(whole.out)
    part = pq.read_table(folder / "part-000000.parquet")
    pq.write_table(part.slice(0, 4), folder / "part-000000.parquet")
    capsys.readouterr()
    resumed = predict(config)
    lines = logged(capsys)
    assert "4 are done" in lines[0]
    assert resumed.metrics == whole.metrics
    assert rows_of(resumed).keys() == rows_of(prediction).keys()
    assert len(list(folder.glob("part-*"))) == 2
    (folder / "part-000000.parquet").unlink()
    assert predict(config).metrics == whole.metrics
    assert [path.name for path in sorted(folder.glob("part-*"))] == [
        "part-000001.parquet",
        "part-000002.parquet",
    ]


def test_another_model_under_the_same_name_does_not_go_on(
    trained: TrainedRun, inbox: Path, tmp_path: Path
) -> None:
    """As after a run was deleted and trained anew; the same one may have moved."""
    predictor = find_predictor(config_of(trained, inbox))
    config, folder = config_of(trained, inbox, "name=retrained"), Folder(tmp_path / "predictions")
    _check_or_write_settings(config, predictor, folder)
    _check_or_write_settings(config, predictor, folder)
    shutil.copytree(str(predictor.folder), tmp_path / "run" / "best")
    moved = replace(predictor, folder=Folder(tmp_path / "run" / "best"))
    _check_or_write_settings(config, moved, folder)
    (tmp_path / "run" / "best" / "model.pt").open("ab").write(b" ")
    with pytest.raises(ConfigError, match="weights: "):
        _check_or_write_settings(config, moved, folder)


@pytest.mark.slow
def test_slices_of_a_volume_are_rows_of_their_own(trained: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "head.nii").write_bytes(make_nifti(ball((48, 52, 40))))
    prediction = predict(config_of(trained, tmp_path, "name=volume"))
    part = pq.read_table(Path(prediction.out) / "part-000000.parquet")
    assert part.num_rows > 3
    assert set(part["path"].to_pylist()) == {"head.nii"}
    assert len(set(part["frame"].to_pylist())) == part.num_rows


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["run=absent"], DataError, "no run 'absent'"),
        (["source=/absent"], DataError, "no such folder"),
        (
            ["name=inbox", "source=/tmp"],
            ConfigError,
            r"inbox exists with other settings \(source: ",
        ),
    ],
)
def test_what_cannot_be_predicted_is_named(
    trained: TrainedRun,
    inbox: Path,
    prediction: JobResult,
    overrides: list[str],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    cv2.imwrite(str(tmp_path / "one.png"), np.zeros((64, 64), np.uint8))
    overrides = [item.replace("source=/tmp", f"source={tmp_path}") for item in overrides]
    with pytest.raises(error, match=message):
        predict(config_of(trained, inbox, *overrides))


@pytest.mark.slow
def test_a_folder_without_a_usable_slice_is_refused(trained: TrainedRun, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "blank.png"), np.zeros((64, 64), np.uint8))
    with pytest.raises(DataError, match="none of the 1 files"):
        predict(config_of(trained, tmp_path, "name=blank"))
