"""A sweep whose driver and Ray head are killed at once repeats no finished trial."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from brainray.config import to_yaml
from brainray.storage import Folder
from tests.conftest import tiny_config
from tests.test_faults import job, kill_tree, result, wait_for

pytestmark = pytest.mark.faults

NUM_TRIALS = 4
NUM_EPOCHS = 6
SPACE = {"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}}


def summaries(storage: Path) -> dict[str, int]:
    """When each trial's run was completed."""
    runs = storage / "runs"
    return {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")}


def histories(storage: Path) -> dict[str, list]:
    runs = Folder(storage / "runs")
    return {name: (runs / name).read_json_lines("metrics.jsonl") for name in runs.names()}


def has_begun(storage: Path) -> bool:
    """Whether some trial is amid its epochs."""
    return any(2 <= len(history) < NUM_EPOCHS for history in histories(storage).values())


def test_a_killed_sweep_submitted_again_goes_on(phantoms: Path, tmp_path: Path) -> None:
    config_file = tmp_path / "config.yaml"
    settings = [
        f"tune.space={json.dumps(SPACE)}",
        f"tune.num_trials={NUM_TRIALS}",
        "tune.algorithm=random",
        "tune.scheduler=none",
        "tune.max_concurrent_trials=2",
        f"train.num_epochs={NUM_EPOCHS}",
        "train.batch_size_per_worker=2",
        "evaluation.tsne_epochs=[]",
    ]
    config_file.write_text(to_yaml(tiny_config(tmp_path, *settings)))
    made = result(job("preprocess", config_file, "name=mri", f"source={phantoms}"))
    assert made["status"] == "ok"

    process = job("tune", config_file, "name=search", "dataset=mri")
    # Two trials run at a time: some are complete, one has an epoch behind it and others to come.
    wait_for(lambda: bool(summaries(tmp_path)) and has_begun(tmp_path))
    kill_tree(process)
    finished, before = summaries(tmp_path), histories(tmp_path)
    assert 1 <= len(finished) < NUM_TRIALS

    again = result(job("tune", config_file, "name=search", "dataset=mri"))
    assert again["status"] == "ok"
    assert again["metrics"]["num_trials"] == NUM_TRIALS
    assert again["metrics"]["num_failed"] == 0
    everything = summaries(tmp_path)
    assert len(everything) == NUM_TRIALS
    assert {name: everything[name] for name in finished} == finished
    for name in everything:
        history = Folder(tmp_path / "runs" / name).read_json_lines("metrics.jsonl")
        assert [epoch["epoch"] for epoch in history] == [*range(1, NUM_EPOCHS + 1)]
        # Not trained anew: even the times of the epochs are the same. The newest epoch may have
        # been told before its checkpoint was kept.
        kept = before.get(name, [])
        kept = kept if name in finished else kept[:-1]
        assert history[: len(kept)] == kept

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("search")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(str(run.info.run_name) for run in runs) == sorted(["search", *everything])
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if run.info.run_name != "search":
            logged = client.get_metric_history(run.info.run_id, "validation/score")
            assert [metric.step for metric in logged] == [*range(1, NUM_EPOCHS + 1)]
