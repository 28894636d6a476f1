"""What is read of a run for prediction."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from brainray.config import PreprocessConfig
from brainray.config_text import load_config
from brainray.orchestration.prediction.export import (
    _how_to_serve,
    _reported_metrics,
    _slices_to_try,
)
from brainray.orchestration.prediction.inference import Predictor, default_name
from brainray.schema import SEEN
from brainray.storage import Folder


def predictor(path: Path, epoch: int) -> Predictor:
    checkpoint: Any = SimpleNamespace(epoch=epoch, image_size=48)
    run: Any = SimpleNamespace(folder=Folder(path))
    return Predictor(Folder(path) / "best", run, checkpoint, PreprocessConfig())


def test_the_temperature_is_that_of_the_models_epoch(tmp_path: Path) -> None:
    history = [{"epoch": 1.0, "validation/temperature": 1.5}, {"epoch": 2.0}, {"epoch": 3.0}]
    history[2]["validation/temperature"] = 0.5
    Folder(tmp_path).write_json_lines("metrics.jsonl", history)
    found = [predictor(tmp_path, epoch).temperature() for epoch in (1, 2, 3, 4)]
    assert found == [1.5, None, 0.5, None]


def test_names_made_from_folders_are_plain_and_differ(tmp_path: Path) -> None:
    """Where results are in a storage given by its URI, ``?`` or ``%20`` would be read as such."""
    names = []
    for folder in ("run#3", "run?3", "run%203", "run 3", "r" * 150, "r" * 151, "mine"):
        for given in (str(tmp_path / folder), (tmp_path / folder).as_uri()):
            config = load_config(None, [f"source={given}"])
            checkpoint: Any = SimpleNamespace(epoch=1)
            where = Folder(given)
            alone = Predictor(where, None, checkpoint, PreprocessConfig())
            names.append(default_name(config, alone))
    assert all(re.fullmatch(r"[\w.-]{1,250}", name) for name in names)
    assert names[::2] == names[1::2]
    assert len(set(names)) == 7
    assert names[-1] == "mine-on-mine"


@pytest.mark.parametrize(("epoch", "is_chosen"), [(2, True), (3, False)])
def test_an_export_of_another_epoch_reports_nothing(
    tmp_path: Path, epoch: int, is_chosen: bool
) -> None:
    metrics = {"chosen_epoch": 2.0, "test/all/head/accuracy": 0.75}
    Folder(tmp_path).write_json("summary.json", metrics)
    run: Any = SimpleNamespace(folder=Folder(tmp_path))
    assert _reported_metrics(run, predictor(tmp_path, epoch)) == (metrics if is_chosen else {})
    assert _reported_metrics(None, predictor(tmp_path, epoch)) == {}


def test_an_export_reads_only_the_first_fingerprints_of_its_run(tmp_path: Path) -> None:
    """The file is damaged further on, where reading it all would fail."""
    rng = np.random.default_rng(0)
    thumbnails = [np.full(96 * 96, shade, np.uint8).tobytes() for shade in range(40)]
    thumbnails += [rng.bytes(96 * 96) for _ in range(3000)]
    table = pa.table({"thumbnail": pa.array(thumbnails, SEEN.field("thumbnail").type)})
    Folder(tmp_path).write_table("seen.parquet", table)
    with (tmp_path / "seen.parquet").open("r+b") as stream:
        stream.seek(15_000_000)
        stream.write(bytes(11_000_000))
    tried = _slices_to_try(predictor(tmp_path, 1))
    assert tried.shape == (32, 1, 48, 48)
    assert tried[:, 0, 0, 0].tolist() == list(range(32))


@pytest.mark.parametrize(
    ("target", "model"),
    [
        ("/data/my scans/exports/a", "/data/my scans/exports/a/mlflow"),
        ("s3://b/exports/a?region=eu-west-1", "s3://b/exports/a/mlflow?region=eu-west-1"),
    ],
)
def test_a_shell_reads_the_whole_path_of_the_model_to_serve(target: str, model: str) -> None:
    command = shlex.split(_how_to_serve(Folder(target)))
    assert command[command.index("-m") + 1] == model
