"""What is read of a run for prediction."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from brainray.config import PreprocessConfig
from brainray.orchestration.prediction.export import _reported_metrics
from brainray.orchestration.prediction.inference import Predictor
from brainray.storage import Folder


def predictor(run: Path, epoch: int) -> Predictor:
    checkpoint: Any = SimpleNamespace(epoch=epoch)
    return Predictor(Folder(run) / "best", Folder(run), None, checkpoint, PreprocessConfig())


def test_the_temperature_is_that_of_the_models_epoch(tmp_path: Path) -> None:
    assert predictor(tmp_path, 1).temperature() is None
    history = [{"epoch": 1.0, "validation/temperature": 1.5}, {"epoch": 2.0}, {"epoch": 3.0}]
    history[2]["validation/temperature"] = 0.5
    Folder(tmp_path).write_json_lines("metrics.jsonl", history)
    found = [predictor(tmp_path, epoch).temperature() for epoch in (1, 2, 3, 4)]
    assert found == [1.5, None, 0.5, None]


@pytest.mark.parametrize(("epoch", "is_chosen"), [(2, True), (3, False)])
def test_an_export_of_another_epoch_reports_nothing(
    tmp_path: Path, epoch: int, is_chosen: bool
) -> None:
    metrics = {"chosen_epoch": 2.0, "test/all/head/accuracy": 0.75}
    Folder(tmp_path).write_json("summary.json", metrics)
    run: Any = SimpleNamespace(folder=Folder(tmp_path))
    assert _reported_metrics(run, predictor(tmp_path, epoch)) == (metrics if is_chosen else {})
    assert _reported_metrics(None, predictor(tmp_path, epoch)) == {}
