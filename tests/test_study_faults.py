"""A study that is killed half-way through its grid repeats nothing that was finished."""

import json
import time
from pathlib import Path

import pytest

from tests.conftest import tiny_config
from tests.test_faults import job, kill_tree, result

pytestmark = pytest.mark.faults

FEATURES = {"pixels": {"encoder": "pixels", "image_size": 16}}


def test_a_killed_study_submitted_again_goes_on(phantoms: Path, tmp_path: Path) -> None:
    from brainray.config_text import to_yaml

    config_file = tmp_path / "config.yaml"
    settings = [
        "name=killed",
        f"source={phantoms}",
        f"study.features={json.dumps(FEATURES)}",
        "study.pca_dims=[2, 3, 4]",
        "study.seeds=[0, 1, 2, 3]",
        "study.min_samples=3",
        "study.max_concurrent_cells=1",
    ]
    config_file.write_text(to_yaml(tiny_config(tmp_path, *settings)))
    cells = tmp_path / "studies" / "killed" / "cells"

    process = job("study", config_file, "seed=0")
    deadline = time.monotonic() + 300
    while len(list(cells.rglob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    kill_tree(process)
    finished = {path: path.stat().st_mtime_ns for path in cells.rglob("*.json")}
    summary = tmp_path / "studies" / "killed" / "summary.json"
    assert len(finished) >= 3
    assert not summary.exists()

    again = result(job("study", config_file, "seed=0"))
    assert again["status"] == "ok"
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    everything = list(cells.rglob("*.json"))
    assert len(everything) == again["metrics"]["num_cells"]
    assert len(everything) > len(finished)
