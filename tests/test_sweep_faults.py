"""Sweeps that lose their driver, their Ray head, a trial or their MLflow server."""

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from brainray.benchmarks.own_nodes import driver_environment, kill_with_children
from brainray.config_text import to_yaml
from brainray.orchestration.own_head import RayHead, own_ray_head, wait_until_ready
from brainray.storage import Folder
from tests.conftest import tiny_config
from tests.test_faults import job, kill_tree, result, wait_for
from tests.tracking_server import free_port, mlflow_server

pytestmark = pytest.mark.faults

Start = Callable[..., subprocess.Popen[str]]

NUM_TRIALS = 4
NUM_EPOCHS = 6
SPACE = {"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}}


@contextlib.contextmanager
def ray_head(num_cpus: int) -> Iterator[RayHead]:
    with own_ray_head(num_cpus=num_cpus) as head:
        wait_until_ready(head)
        yield head


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


@pytest.fixture
def start(phantoms: Path, tmp_path: Path) -> Start:
    """Begin the sweep ``search`` on a Ray head, or on one that it starts itself."""
    config_file = tmp_path / "config.yaml"
    settings = [
        f"tune.space={json.dumps(SPACE)}",
        f"tune.num_trials={NUM_TRIALS}",
        "tune.algorithm=random",
        "tune.scheduler=none",
        f"train.num_epochs={NUM_EPOCHS}",
        "train.batch_size_per_worker=2",
        "evaluation.tsne_epochs=[]",
    ]
    config_file.write_text(to_yaml(tiny_config(tmp_path, *settings)))
    made = result(job("preprocess", config_file, "name=mri", f"source={phantoms}"))
    assert made["status"] == "ok"

    def begin(head: RayHead | None = None, *settings: str) -> subprocess.Popen[str]:
        sweep = ["name=search", "dataset=mri", *settings]
        environment = os.environ if head is None else driver_environment(head)
        return job("tune", config_file, *sweep, environment=environment)

    return begin


def assert_complete(storage: Path, tracking_uri: str, num_epochs: int = NUM_EPOCHS) -> None:
    """Every trial has all of its epochs, in its run's folder and in MLflow, once and in order."""
    names = list(summaries(storage))
    assert len(names) == NUM_TRIALS
    for history in histories(storage).values():
        assert [epoch["epoch"] for epoch in history] == [*range(1, num_epochs + 1)]
    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name("search")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(str(run.info.run_name) for run in runs) == sorted(["search", *names])
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if run.info.run_name != "search":
            logged = client.get_metric_history(run.info.run_id, "validation/score")
            assert [metric.step for metric in logged] == [*range(1, num_epochs + 1)]


def assert_nothing_repeated(
    storage: Path, finished: dict[str, int], before: dict[str, list]
) -> None:
    """Neither a finished trial nor, in the others, an epoch: even their times are the same."""
    completed, now = summaries(storage), histories(storage)
    assert {name: completed[name] for name in finished} == finished
    for name, history in before.items():
        # The newest epoch may have been logged before its checkpoint was kept.
        kept = history if name in finished else history[:-1]
        assert now[name][: len(kept)] == kept


def test_a_killed_sweep_submitted_again_goes_on(start: Start, tmp_path: Path) -> None:
    process = start(None, "tune.max_concurrent_trials=2")
    # Two trials run at a time: some are complete, one has an epoch behind it and others to come.
    wait_for(lambda: bool(summaries(tmp_path)) and has_begun(tmp_path))
    kill_tree(process)
    finished, before = summaries(tmp_path), histories(tmp_path)
    assert 1 <= len(finished) < NUM_TRIALS

    again = result(start(None, "tune.max_concurrent_trials=2"))
    assert again["status"] == "ok"
    assert again["metrics"]["num_trials"] == NUM_TRIALS
    assert again["metrics"]["num_failed"] == 0
    assert_nothing_repeated(tmp_path, finished, before)
    assert_complete(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")


def test_a_sweep_goes_on_after_its_ray_head_alone_is_killed(start: Start, tmp_path: Path) -> None:
    with ray_head(2) as head:
        process = start(head)
        wait_for(lambda: bool(summaries(tmp_path)) and has_begun(tmp_path))
        kill_with_children(head.process.pid)
        assert process.wait(timeout=300) != 0
    finished, before = summaries(tmp_path), histories(tmp_path)
    assert 1 <= len(finished) < NUM_TRIALS

    with ray_head(2) as head:
        assert result(start(head))["status"] == "ok"
    assert_nothing_repeated(tmp_path, finished, before)
    assert_complete(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")


def test_four_trials_at_once_lose_nothing_when_one_is_killed_and_the_server_is_away(
    start: Start, tmp_path: Path
) -> None:
    num_epochs = 5 * NUM_EPOCHS  # no trial may end before the server is there again
    store, port = f"sqlite:///{tmp_path}/server.db", free_port()
    options = ["--artifacts-destination", str(tmp_path / "artifacts")]
    with ray_head(4) as head:
        with mlflow_server(store, port, *options) as address:
            process = start(head, f"tracking.uri={address}", f"train.num_epochs={num_epochs}")
            wait_for(lambda: len(histories(tmp_path)) == NUM_TRIALS and has_begun(tmp_path))
        away_since = histories(tmp_path)
        worker = next(
            member
            for member in psutil.Process(head.process.pid).children(recursive=True)
            if " ".join(member.cmdline()).startswith("ray::RayTrainWorker")
        )
        worker.kill()
        wait_for(
            lambda: any(
                len(history) > len(away_since.get(name, []))
                for name, history in histories(tmp_path).items()
            )
        )
        with mlflow_server(store, port, *options):
            done = result(process)
            assert done["status"] == "ok"
            assert done["metrics"]["num_trials"] == NUM_TRIALS
            assert done["metrics"]["num_failed"] == 0
            assert_complete(tmp_path, address, num_epochs)
    assert_nothing_repeated(tmp_path, {}, away_since)
