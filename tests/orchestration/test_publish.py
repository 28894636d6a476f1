"""A run's figures are found where they were sent."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch

from brainray.config_text import load_config
from brainray.orchestration import publish
from brainray.orchestration.provenance import PACKAGES, about_software
from brainray.orchestration.publish import (
    _requested_uri,
    _software_tags,
    begin_tracking,
    how_to_open,
    open_tracking,
    send_run,
)
from brainray.orchestration.run import Run
from brainray.storage import Folder


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("https://mlflow.example.org/team", "https://mlflow.example.org/team"),
        ("databricks://profile", "databricks://profile"),
        ("sqlite:////data/mlflow.db", "mlflow ui --backend-store-uri sqlite:////data/mlflow.db"),
        (
            "sqlite:////my data/mlflow.db",
            "mlflow ui --backend-store-uri 'sqlite:////my data/mlflow.db'",
        ),
        ("postgresql://db/mlflow", "mlflow ui --backend-store-uri postgresql://db/mlflow"),
    ],
)
def test_a_server_has_a_page_and_a_database_needs_a_command(uri: str, expected: str) -> None:
    assert how_to_open(uri) == expected


@pytest.mark.parametrize("is_complete", [False, True])
def test_what_there_is_of_a_run_is_sent(tmp_path: Path, is_complete: bool) -> None:
    folder = Folder(tmp_path)
    folder.write_json_lines("metrics.jsonl", [{"epoch": 1.0}])
    for name in ("config.yaml", "figures/loss.png", "dataset/figures/skull_strip.png"):
        folder.write_bytes(name, b"")
    if is_complete:
        folder.write_json("summary.json", {"chosen_epoch": 1.0})
    tracker: Any = Mock()
    send_run(Run(folder, cast(Any, None)), tracker)
    tracker.log_epochs.assert_called_once_with([{"epoch": 1.0}])
    (names,) = tracker.log_files.call_args.args
    sent = {"config.yaml", "metrics.jsonl", "figures/loss.png", "dataset/figures/skull_strip.png"}
    assert sorted(names) == sorted(sent | ({"summary.json"} if is_complete else set()))
    summaries = [call.args for call in tracker.log_summary.call_args_list]
    assert summaries == ([({"chosen_epoch": 1.0},)] if is_complete else [])
    assert tracker.finish.called == is_complete


def test_a_database_in_the_environment_is_used_wherever_a_command_is_run_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, ["tracking.uri=http://host:5000"])
    assert _requested_uri(config) == "http://host:5000"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///m.db")
    assert _requested_uri(config) == f"sqlite:///{tmp_path}/m.db"


def test_tags_tell_of_the_software_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINRAY_GIT_REVISION", "1234567")
    monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "raysubmit_1")
    whole = dict.fromkeys(PACKAGES, "1.0")
    tags = _software_tags(about_software() | {"ray_job_id": "01000000", "packages": whole})
    names = ["version", "code_hash", "git_revision", "ray_job_id", "ray_submission_id"]
    names += ["python", "platform", *PACKAGES]
    assert set(tags) == {f"brainray.{name}" for name in names}
    earlier = {"brainray": "0.1", "git_revision": "", "packages": {"numpy": "2.0", "captum": ""}}
    assert _software_tags(earlier) == {"brainray.version": "0.1", "brainray.numpy": "2.0"}


def test_this_software_is_only_named_where_it_made_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Mock()
    monkeypatch.setattr(publish, "Tracker", tracker)
    config = load_config(None, ["name=old", f"storage={tmp_path}"])
    record: Any = SimpleNamespace(num_slices={}, data_hash="abc")
    run = Run(Folder(tmp_path) / "runs" / "old", record)

    begin_tracking(config, run)
    *_, tags = tracker.return_value.begin.call_args.args
    assert set(tags) == {"brainray.data_hash", "brainray.run_folder"}

    run.folder.write_json_lines("provenance.jsonl", [{"packages": {"torch": "2.0"}}])
    begin_tracking(config, run)
    *_, tags = tracker.return_value.begin.call_args.args
    assert tags["brainray.torch"] == "2.0"

    open_tracking(config, run.folder, {}, {})
    *_, tags = tracker.return_value.begin.call_args.args
    assert tags["brainray.torch"] == torch.__version__
