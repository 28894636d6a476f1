"""Which slices an evaluation scores, without predicting any."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from brainray.config import PreprocessConfig
from brainray.config_text import to_yaml
from brainray.errors import ConfigError, DataError
from brainray.orchestration.prediction import evaluation
from brainray.orchestration.prediction.evaluation import (
    _by_usability,
    _check_source,
    _counted,
    _files_to_score,
    _groups,
)
from brainray.orchestration.preprocessing.source import FoundFile, Listing, SourceFile
from brainray.storage import Folder
from tests.conftest import tiny_config

CLASSES = ["glioma", "notumor"]


def listing(*files: tuple[str, str | None, str]) -> Listing:
    """Of files given by path, label and split."""
    found = [
        SourceFile(file=FoundFile(path, 1, 0), label=label, split=split)
        for path, label, split in files
    ]
    return Listing(found, Counter(), [])


FILES = listing(
    ("a.png", "glioma", "test"),
    ("b.png", "glioma", "train"),
    ("c.png", None, "test"),
    ("d.png", "notumor", "train"),
    ("e.png", "notumor", "train"),
)


def test_only_labelled_files_of_the_test_split_are_scored(tmp_path: Path) -> None:
    files, left_out = _files_to_score(FILES, tiny_config(tmp_path), CLASSES, None)
    assert [file.path for file in files] == ["a.png"]
    assert left_out == {"outside the test split": 3, "without a class": 1}


def test_an_evaluation_is_replaced_by_one_of_the_same_epoch_only(tmp_path: Path) -> None:
    made_by = tiny_config(tmp_path, "source=/data", "run=mine", "epoch=3")
    target = Folder(tmp_path / "evaluations" / "a")
    target.write_bytes("config.yaml", to_yaml(made_by).encode())
    target.write_json("metrics.json", {"epoch": 3.0})
    _check_source(made_by, 3, target, from_pipeline=False)
    (tmp_path / "mine" / "epoch-0003").mkdir(parents=True)
    (tmp_path / "mine" / "run.json").touch()
    by_path = {"run": None, "epoch": None, "checkpoint": str(tmp_path / "mine" / "epoch-0003")}
    for settings in (by_path, {"source": "/data/"}):
        _check_source(made_by.model_copy(update=settings), 3, target, from_pipeline=False)
    for epoch in (None, 2):
        other = made_by.model_copy(update={"epoch": epoch})
        with pytest.raises(
            ConfigError, match=r"is the evaluation of another model \(mine, epoch 3"
        ):
            _check_source(other, epoch or 3, target, from_pipeline=False)


def test_selected_files_are_scored_whatever_their_split(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "source=/data")
    files, left_out = _files_to_score(FILES, config, CLASSES, {"b.png", "d.png"})
    assert ([file.path for file in files], left_out.total()) == (["b.png", "d.png"], 0)
    with pytest.raises(DataError, match=r"/data lacks 1 of 2 files to score, such as z\.png"):
        _files_to_score(FILES, config, CLASSES, {"b.png", "z.png"})


def test_classes_that_the_run_does_not_know_are_counted(tmp_path: Path) -> None:
    files = listing(*((name, name[0], "test") for name in ("b1", "a1", "b2")))
    with pytest.raises(DataError, match=r"knows glioma, notumor\): 'a' \(1 files\), 'b' \(2 fil"):
        _files_to_score(files, tiny_config(tmp_path), CLASSES, None)
    assert _counted(Counter("abcdefg")).endswith("'e' (1 files) and 2 more")


def test_files_of_which_no_slice_is_usable_are_counted_once(tmp_path: Path) -> None:
    names = ("path", "frame", "reason", "detail", "sha256")
    rows: list[dict[str, Any]] = [
        dict.fromkeys(names, "") | {"num_bytes": 1, "path": "a.nii", "reason": "blank"}
    ] * 3
    with pytest.raises(DataError, match=r"none of the 1 files in /data is usable: blank \(3\)"):
        _by_usability(pa.Table.from_pylist(rows), tiny_config(tmp_path, "source=/data"))
    rows.append(rows[0] | {"path": "b.nii"})
    reasons = pa.array(["blank", None, "blank", None], pa.string())
    table = pa.Table.from_pylist(rows).drop_columns("reason").append_column("reason", reasons)
    accepted, rejected = _by_usability(table, tiny_config(tmp_path, "source=/data"))
    assert accepted["path"].to_pylist() == ["a.nii", "b.nii"]
    assert rejected["path"].to_pylist() == ["a.nii", "a.nii"]


def test_test_slices_of_the_run_are_resampled_as_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = pa.table({"sample_id": ["a", "b", "a"]})
    known = {"a": "1", "b": "2", "c": "1"}
    monkeypatch.setattr(evaluation, "group_strangers", None)  # no slice is compared again
    assert _groups(rows, PreprocessConfig(), known) == known
