"""Several nodes of one Ray cluster, which share nothing but the storage path; nodes that go."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from brainray import layout
from brainray.benchmarks.own_nodes import (
    driver_environment,
    kill_with_children,
    own_ray_node,
    wait_for_nodes,
)
from brainray.config_text import to_yaml
from brainray.engine.state import load_checkpoint
from brainray.orchestration.own_head import RayHead, own_ray_head, wait_until_ready
from brainray.storage import Folder
from tests.conftest import tiny_config

pytestmark = pytest.mark.faults

PROJECT = Path(__file__).parents[1]
RUN = """
import runpy, sys
from brainray.orchestration import progress, ray_train
ray_train._RESIZE_INTERVAL_S = progress._ROOM_EVERY_S = 5.0
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@contextlib.contextmanager
def nodes(*num_cpus: int) -> Iterator[tuple[RayHead, list[subprocess.Popen[bytes]]]]:
    """A head and further nodes with so many CPUs each."""
    first, *others = num_cpus
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(own_ray_head(num_cpus=first))
        wait_until_ready(head)
        started = []
        for count in others:
            started.append(stack.enter_context(own_ray_node(head, num_cpus=count)))
            wait_for_nodes(head, 1 + len(started))
        yield head, started


@pytest.fixture
def job(tmp_path: Path, phantoms: Path) -> Callable[..., subprocess.Popen[str]]:
    config = tmp_path / "config.yaml"
    settings = ["train.num_epochs=6", "train.batch_size_per_worker=2", f"source={phantoms}"]
    config.write_text(to_yaml(tiny_config(tmp_path, *settings)))

    def start(head: RayHead, name: str, *overrides: str) -> subprocess.Popen[str]:
        path = str(PROJECT / "jobs" / f"{name}.py")
        return subprocess.Popen(
            [sys.executable, "-c", RUN, path, "--config", str(config), "--set", *overrides],
            env={**driver_environment(head), "PYTHONPATH": str(PROJECT)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
        )

    return start


def result(process: subprocess.Popen[str]) -> dict:
    out, _ = process.communicate(timeout=900)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return dict(json.loads(lines[-1]))


def history(storage: Path, name: str) -> list[dict[str, float]]:
    return Folder(storage / "runs" / name).read_json_lines(layout.METRICS)


def trials(storage: Path) -> list[str]:
    return [path.name for path in (storage / "runs").glob("search-*")]


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.2)


def wait_for_epoch(storage: Path, name: str, epoch: int) -> None:
    wait_until(lambda: len(history(storage, name)) >= epoch, f"epoch {epoch}")


def wait_for_workers(storage: Path, name: str, number: int) -> None:
    """Until so many have made the newest epoch."""
    wait_until(
        lambda: [row["train/num_workers"] for row in history(storage, name)][-1:] == [number],
        f"epoch by {number} workers",
    )


def last_weights(storage: Path, name: str) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(Folder(storage / "runs" / name / "last")).encoder.state_dict())


def assert_complete(storage: Path, name: str) -> None:
    assert [row["epoch"] for row in history(storage, name)] == [*range(1, 7)]
    assert_every_slice_fitted(storage, name)


def assert_every_slice_fitted(storage: Path, name: str) -> None:
    """In the chosen epoch; in each one, every validation slice was predicted."""
    seen = Folder(storage / "runs" / name).read_table(layout.SEEN)
    fitted = Folder(storage / "runs" / name / layout.BEST).read_table(layout.FITTED)
    num_validation = sum(role == "validation" for role in seen["role"].to_pylist())
    assert fitted.num_rows == seen.num_rows - num_validation
    assert len(set(fitted["sample_id"].to_pylist())) == fitted.num_rows
    predicted = {row["validation/num_slices"] for row in history(storage, name)}
    assert predicted == {num_validation}


def test_four_workers_on_three_nodes_preprocess_and_train(tmp_path: Path, job: Callable) -> None:
    with nodes(2, 1, 1) as (head, _):
        assert result(job(head, "preprocess", "name=mri"))["status"] == "ok"
        settings = ["name=four", "dataset=mri", "train.num_workers=4"]
        trained = result(job(head, "train", *settings))
        assert trained["status"] == "ok"
        assert trained["run_id"]
    assert_complete(tmp_path, "four")
    assert {row["train/num_workers"] for row in history(tmp_path, "four")} == {4.0}


def test_a_sweep_has_trials_on_several_nodes_at_once(tmp_path: Path, job: Callable) -> None:
    space = {"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}}
    settings = ["name=search", "dataset=mri", f"tune.space={json.dumps(space)}"]
    settings += ["tune.num_trials=3", "tune.algorithm=random", "tune.scheduler=none"]
    with nodes(1, 1, 1) as (head, _):
        assert result(job(head, "preprocess", "name=mri"))["status"] == "ok"
        process = job(head, "tune", *settings)
        most_at_once = 0
        while process.poll() is None:
            epochs = [len(history(tmp_path, name)) for name in trials(tmp_path)]
            # A trial takes the only CPU of a node.
            most_at_once = max(most_at_once, sum(0 < epoch < 6 for epoch in epochs))
            time.sleep(0.1)
        assert result(process)["status"] == "ok"
    assert most_at_once >= 2
    assert len(trials(tmp_path)) == 3
    for name in trials(tmp_path):
        assert_complete(tmp_path, name)


def test_a_node_that_goes_and_one_that_comes_change_the_number_of_workers_only(
    tmp_path: Path, job: Callable
) -> None:
    with nodes(1, 1, 1) as (head, others):
        assert result(job(head, "preprocess", "name=mri"))["status"] == "ok"
        settings = ["name=elastic", "dataset=mri", "train.num_workers=3", "train.min_workers=1"]
        # More epochs than fit into the minutes in which a node starts and Ray Train sees it.
        process = job(head, "train", *settings, "train.num_epochs=2000")
        wait_for_workers(tmp_path, "elastic", 3)
        kill_with_children(others[0].pid)
        wait_for_workers(tmp_path, "elastic", 2)
        with own_ray_node(head, num_cpus=1):
            wait_for_workers(tmp_path, "elastic", 3)
            process.send_signal(signal.SIGTERM)
            assert "ended by SIGTERM" in result(process)["error"]
    epochs = [row["epoch"] for row in history(tmp_path, "elastic")]
    assert epochs == [*range(1, len(epochs) + 1)]
    assert_every_slice_fitted(tmp_path, "elastic")


def test_a_warm_up_goes_on_when_a_node_leaves(tmp_path: Path, job: Callable) -> None:
    settings = ["name=warm", "dataset=mri", "train.num_workers=2", "train.min_workers=1"]
    settings += ["encoder.pretext=contrastive", "encoder.pretext_image_size=16"]
    settings += ["self_supervision.batch_size_per_worker=4", "self_supervision.num_epochs=6"]

    def warmed_up() -> list[float]:
        paths = (tmp_path / "encoders").glob(f"*/{layout.METRICS}")
        return [
            row["epoch"] for path in paths for row in Folder(path.parent).read_json_lines(path.name)
        ]

    with nodes(1, 1) as (head, others):
        assert result(job(head, "preprocess", "name=mri"))["status"] == "ok"
        process = job(head, "train", *settings)
        wait_until(warmed_up, "epoch of the warm-up")
        kill_with_children(others[0].pid)
        wait_until(lambda: len(warmed_up()) == 6, "end of the warm-up on one node")
        assert result(process)["status"] == "ok"
    assert warmed_up() == [*range(1, 7)]
    assert_complete(tmp_path, "warm")
    assert {row["train/num_workers"] for row in history(tmp_path, "warm")} == {1.0}


def test_a_lost_node_is_waited_for_in_plain_words(tmp_path: Path, job: Callable) -> None:
    with nodes(1, 1) as (head, others):
        assert result(job(head, "preprocess", "name=mri"))["status"] == "ok"
        process = job(head, "train", "name=waits", "dataset=mri", "train.num_workers=2")
        wait_for_epoch(tmp_path, "waits", 1)
        kill_with_children(others[0].pid)
        waits = "waiting for nodes (1 alive): 2 workers with 1 CPU(s) each do not fit: the Ray "
        waits += "cluster has room for 1; "
        too_late = threading.Timer(300, process.kill)
        too_late.start()
        assert any(line.startswith(waits) for line in process.stdout), "it waits in silence"
        too_late.cancel()
        with own_ray_node(head, num_cpus=1):
            assert result(process)["status"] == "ok"
    assert_complete(tmp_path, "waits")


def test_a_killed_driver_and_a_killed_head_cost_the_epoch_under_way_only(
    tmp_path: Path, job: Callable
) -> None:
    settings = ["name=killed", "dataset=mri", "train.num_workers=2"]
    with nodes(1, 1) as (head, _):
        assert result(job(head, "preprocess", "name=mri"))["status"] == "ok"
        whole = ["name=whole", "dataset=mri", "train.num_workers=2"]
        assert result(job(head, "train", *whole))["status"] == "ok"
        process = job(head, "train", *settings)
        wait_for_epoch(tmp_path, "killed", 1)
        process.kill()  # the driver alone: its workers are Ray's to end
        process.wait()
        process = job(head, "train", *settings)
        wait_for_epoch(tmp_path, "killed", 3)
        kill_with_children(head.process.pid)
        assert process.wait(timeout=300) != 0
    with nodes(1, 1) as (head, _):
        assert result(job(head, "train", *settings))["status"] == "ok"
    assert_complete(tmp_path, "killed")
    expected, found = last_weights(tmp_path, "whole"), last_weights(tmp_path, "killed")
    for name, value in expected.items():
        assert value.equal(found[name]), name
    assert not list((tmp_path / "locks").iterdir())


def test_what_a_head_of_ours_opens_takes_no_one_without_the_token(tmp_path: Path) -> None:
    with nodes(1) as (head, _):
        stranger = {**driver_environment(head), "RAY_AUTH_TOKEN": "0" * 64}
        code = "import ray; ray.init(logging_level='ERROR'); print(ray.nodes())"
        attempt = subprocess.run(
            [sys.executable, "-c", code],
            env={**stranger, "PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert attempt.returncode != 0
        assert "NodeID" not in attempt.stdout
        port = int(head.url.rpartition(":")[2])
        listening = subprocess.run(["ss", "-ltn"], capture_output=True, text=True, check=True)
        addresses = [line.split()[3] for line in listening.stdout.splitlines()[1:]]
        assert [one for one in addresses if one.endswith(f":{port}")] == [f"127.0.0.1:{port}"]
        assert os.environ.get("RAY_AUTH_MODE") != "disabled"
