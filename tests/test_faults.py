"""What a machine that goes down does to a run: every process of it is killed at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from brainray.engine.state import load_checkpoint
from brainray.storage import Folder
from tests.conftest import tiny_config

pytestmark = pytest.mark.faults

PROJECT = Path(__file__).parents[1]
SLOW = ["train.num_epochs=6", "train.batch_size_per_worker=2"]


def job(name: str, config_file: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROJECT / "jobs" / f"{name}.py"), "--config", str(config_file)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    return subprocess.Popen(
        [*command, "--set", *settings],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def result(process: subprocess.Popen[str]) -> dict:
    out, _ = process.communicate(timeout=300)
    return dict(json.loads(out.splitlines()[-1]))


def kill_tree(process: subprocess.Popen[str]) -> None:
    root = psutil.Process(process.pid)
    for member in [*root.children(recursive=True), root]:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def test_a_killed_job_submitted_again_ends_as_if_undisturbed(
    phantoms: Path, tmp_path: Path
) -> None:
    from brainray.config import to_yaml

    config_file = tmp_path / "config.yaml"
    config_file.write_text(to_yaml(tiny_config(tmp_path, *SLOW)))
    made = result(job("preprocess", config_file, "name=mri", f"source={phantoms}"))
    assert made["status"] == "ok"
    undisturbed = result(job("train", config_file, "name=whole", "dataset=mri"))
    assert undisturbed["status"] == "ok"

    process = job("train", config_file, "name=killed", "dataset=mri")
    metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert metrics.exists()
    kill_tree(process)
    assert len(metrics.read_text().splitlines()) < 6

    again = result(job("train", config_file, "name=killed", "dataset=mri"))
    assert again["status"] == "ok"
    history = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["epoch"] for line in history] == [1, 2, 3, 4, 5, 6]
    whole, killed = (
        load_checkpoint(Folder(tmp_path / "runs" / name / "last")) for name in ("whole", "killed")
    )
    for one, two in zip(whole.encoder.parameters(), killed.encoder.parameters(), strict=True):
        assert one.equal(two)
    assert again["metrics"]["chosen_epoch"] == undisturbed["metrics"]["chosen_epoch"]
