"""Which slices an evaluation scores, without predicting any."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from brainray.config import Config, PreprocessConfig
from brainray.config_text import to_yaml
from brainray.errors import ConfigError, DataError
from brainray.mri.phantom import make_slice
from brainray.mri.resize import thumbnail
from brainray.orchestration.prediction import evaluation
from brainray.orchestration.prediction.evaluation import (
    _by_usability,
    _check_source,
    _counted,
    _files_to_score,
    _groups,
    _model_of,
    _settings,
    _with_subset_columns,
    check_evaluation_name,
)
from brainray.orchestration.prediction.inference import Predictor
from brainray.orchestration.preprocessing.source import FoundFile, Listing, SourceFile
from brainray.orchestration.run import Run, groups_of_test_slices
from brainray.schema import PREDICTIONS, SEEN
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


def predictor_of(folder: Folder, epoch: int, *, in_run: bool = True) -> Predictor:
    """Of a checkpoint that need not exist."""
    checkpoint: Any = SimpleNamespace(epoch=epoch, config=Config())
    record: Any = SimpleNamespace(subject_salt="")
    run = Run(folder.parent, record) if in_run else None
    return Predictor(folder, run, checkpoint, PreprocessConfig())


def model_of(storage: Path, folder: Folder, *overrides: str) -> dict[str, Any]:
    """Of a checkpoint of epoch 3, requested in some way."""
    return _model_of(tiny_config(storage, *overrides), predictor_of(folder, 3))


def test_a_model_is_named_in_one_way_however_it_is_requested(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    mine = Folder(storage) / "runs" / "mine"
    chosen, third = ({"run": "mine", "epoch": epoch, "checkpoint": None} for epoch in (None, 3))
    assert model_of(storage, mine / "best", "run=mine") == chosen
    assert model_of(storage, mine / "best", f"checkpoint={mine}/best") == chosen
    for place in ("epoch-0003", "last"):
        assert model_of(storage, mine / place, f"checkpoint={mine}/{place}") == third
    # Another epoch may be chosen later, and its checkpoint may move.
    for place in ("epoch-0003", "last", "best"):
        assert model_of(storage, mine / place, "run=mine", "epoch=3") == third
    (storage / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(storage)
    assert model_of(tmp_path / "link", mine / "last", f"checkpoint={mine}/last") == third


def test_a_model_that_the_storage_does_not_have_is_named_by_its_folder(tmp_path: Path) -> None:
    """Its run may be a different one from the storage's of that name."""
    away = Folder(tmp_path / "away" / "runs" / "mine" / "best")
    expected = {"run": None, "epoch": None, "checkpoint": str(away)}
    assert model_of(tmp_path, away, f"checkpoint={away}") == expected
    config = tiny_config(tmp_path, f"checkpoint={away}/model.pt")
    assert _model_of(config, predictor_of(away, 3, in_run=False)) == expected


def test_an_evaluation_is_replaced_by_one_of_the_same_model_and_source_only(
    tmp_path: Path,
) -> None:
    target, mine = Folder(tmp_path / "evaluations" / "a"), Folder(tmp_path / "runs" / "mine")
    config = tiny_config(tmp_path, "source=/data", f"checkpoint={mine}/epoch-0003", "name=a")
    predictor = predictor_of(mine / "epoch-0003", 3)
    settings = _settings(config, predictor, _model_of(config, predictor))
    target.write_bytes("config.yaml", to_yaml(settings).encode())

    def check(place: str, epoch: int, *overrides: str, source: str = "/data") -> None:
        asked = tiny_config(tmp_path, f"source={source}", *overrides)
        model = _model_of(asked, predictor_of(mine / place, epoch))
        _check_source(asked, model, target, from_pipeline=False)

    check("epoch-0003", 3, f"checkpoint={mine}/epoch-0003")
    check("best", 3, "run=mine", "epoch=3", source="/data/")
    with pytest.raises(ConfigError, match=r"\(source: /data here, /elsewhere/data requested\)"):
        check("epoch-0003", 3, "run=mine", "epoch=3", source="/elsewhere/data")
    exists = f"evaluation {target} exists with other settings"
    for place, epoch, asked in (("best", 3, "null"), ("last", 4, "4")):
        named = "unset" if asked == "null" else asked
        another = rf"{exists} \(epoch: 3 here, {named} requested\): choose another name"
        with pytest.raises(ConfigError, match=another):
            check(place, epoch, "run=mine", f"epoch={asked}")
    with pytest.raises(ConfigError, match=rf"{exists} \(run: mine here, a requested\)"):
        check_evaluation_name(tiny_config(tmp_path, "source=/data", "name=a"))


def test_a_pipelines_evaluation_may_be_repeated_where_its_files_are_now(tmp_path: Path) -> None:
    target = Folder(tmp_path / "evaluations" / "a")
    target.write_bytes("config.yaml", b"source: /where/they/were\nrun: a\n")
    config = tiny_config(tmp_path, "source=/data", "name=a")
    check_evaluation_name(config)
    target.write_bytes("config.yaml", b"source: /where/they/were\nrun: a\nepoch: 1\n")
    with pytest.raises(ConfigError, match=r"\(epoch: 1 here, unset requested\)"):
        check_evaluation_name(config)
    target.write_bytes("config.yaml", b"source: /data\ncheckpoint: /b\n")
    with pytest.raises(ConfigError, match=r"\(checkpoint: /b here, .*; run: unset here, a req"):
        check_evaluation_name(config)


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


def test_test_slices_of_the_run_are_as_strict_as_in_training(tmp_path: Path) -> None:
    """Both files' headers name a patient whom the run's labels table named for another file: what
    training knew by the table, an evaluation of folders cannot see.
    """
    rng = np.random.default_rng(0)
    heads = [thumbnail(make_slice("glioma", rng, 128, "axial").image).tobytes() for _ in range(3)]

    def table(names: str, source: str, thumbnails: list[bytes], schema: pa.Schema) -> pa.Table:
        rows = [
            dict.fromkeys(schema.names)
            | {"sample_id": name, "path": name, "thumbnail": head, "label": "glioma"}
            | {"subject_id": f"in {source}", "subject_source": source}
            for name, head in zip(names, thumbnails, strict=True)
        ]
        return pa.Table.from_pylist(rows, schema)

    run = Folder(tmp_path)
    run.write_table("seen.parquet", table("s", "table", heads[:1], SEEN))
    columns = {"sample_id": ["t"], "split_group_id": ["t"], "clean": [True], "strict": [False]}
    run.write_table("test.parquet", pa.table(columns))
    predictor = predictor_of(run / "best", 1)
    subject = [SEEN.field(name) for name in ("subject_id", "subject_source")]
    accepted = table("tu", "header", heads[1:], pa.schema([*PREDICTIONS, *subject]))
    found, _ = _with_subset_columns(
        accepted, predictor.seen(), tiny_config(tmp_path), predictor, groups_of_test_slices(run)
    )
    assert found["clean"].to_pylist() == [True, True]
    assert found["strict"].to_pylist() == [False, True]


def test_test_slices_of_the_run_are_resampled_as_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = pa.table({"sample_id": ["a", "b", "a"]})
    known = {"a": "1", "b": "2", "c": "1"}
    monkeypatch.setattr(evaluation, "group_strangers", None)  # no slice is compared again
    assert _groups(rows, PreprocessConfig(), known) == known
