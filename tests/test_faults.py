"""What a machine that goes down, a signal, a second job or a lost process does to a run."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

import psutil
import pytest
import torch
from mlflow import MlflowClient
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from brainray.benchmarks.own_nodes import kill_with_children
from brainray.config_text import to_yaml
from brainray.engine.state import load_checkpoint
from brainray.mri.phantom import write_phantoms
from brainray.orchestration.store import ImageStore
from brainray.storage import Folder
from tests.conftest import tiny_config

pytestmark = pytest.mark.faults

PROJECT = Path(__file__).parents[1]
_RAY_MESSAGE = "killed due to memory pressure"
SLOW = ["train.num_epochs=6", "train.batch_size_per_worker=2"]


def job(
    name: str,
    config_file: Path,
    *settings: str,
    environment: Mapping[str, str] = os.environ,
    stderr: TextIO | None = None,
) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROJECT / "jobs" / f"{name}.py"), "--config", str(config_file)]
    return subprocess.Popen(
        [*command, "--set", *settings],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**environment, "PYTHONPATH": str(PROJECT)},
        start_new_session=True,
    )


def result(process: subprocess.Popen[str]) -> dict:
    out, _ = process.communicate(timeout=900)
    print(out)  # for the report of a test that fails
    return dict(json.loads(out.splitlines()[-1]))


def wait_for(condition: Callable[[], bool], timeout_s: float = 900) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def epochs_of(storage: Path, name: str) -> list[float]:
    lines = Folder(storage / "runs" / name).read_json_lines("metrics.jsonl")
    return [line["epoch"] for line in lines]


def assert_same_weights(storage: Path, *names: str) -> None:
    whole, other = (load_checkpoint(Folder(storage / "runs" / name / "last")) for name in names)
    for one, two in zip(whole.encoder.parameters(), other.encoder.parameters(), strict=True):
        assert one.equal(two)


def workers_of(process: subprocess.Popen[str], title: str) -> list[psutil.Process]:
    """Ray's worker processes of a job that show such a title."""
    workers = []
    for member in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(member.cmdline()):
                workers.append(member)
    return workers


def assert_ends_in_order(
    process: subprocess.Popen[str], by: signal.Signals, storage: Path, run: str
) -> None:
    """A job that has just been sent a signal."""
    started = time.monotonic()
    ended = result(process)
    assert process.returncode == 1
    assert time.monotonic() - started < 30
    assert f"ended by {by.name}: submit it again under the same name" in ended["error"]
    assert not list((storage / "locks").iterdir())
    state = Folder(storage / "runs" / run).read_json("tracking.json")
    assert MlflowClient(state["uri"]).get_run(state["run_id"]).info.status == "KILLED"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(tiny_config(tmp_path, *SLOW)))
    return path


def kill_tree(process: subprocess.Popen[str]) -> None:
    kill_with_children(process.pid)
    process.wait()


def test_a_killed_job_submitted_again_ends_as_if_undisturbed(
    phantoms: Path, tmp_path: Path, config_file: Path
) -> None:
    made = result(job("preprocess", config_file, "name=mri", f"source={phantoms}"))
    assert made["status"] == "ok"
    undisturbed = result(job("train", config_file, "name=whole", "dataset=mri"))
    assert undisturbed["status"] == "ok"

    process = job("train", config_file, "name=killed", "dataset=mri")
    metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
    wait_for(metrics.exists)
    kill_tree(process)
    assert len(metrics.read_text().splitlines()) < 6

    again = result(job("train", config_file, "name=killed", "dataset=mri"))
    assert again["status"] == "ok"
    history = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["epoch"] for line in history] == [1, 2, 3, 4, 5, 6]
    assert_same_weights(tmp_path, "whole", "killed")
    assert again["metrics"]["chosen_epoch"] == undisturbed["metrics"]["chosen_epoch"]


def test_a_killed_warm_up_goes_on_and_leaves_the_same_encoder(
    phantoms: Path, tmp_path: Path, config_file: Path
) -> None:
    warm_up = ["dataset=mri", "name=warm", "train.num_epochs=1", "encoder.pretext=contrastive"]
    warm_up += ["encoder.pretext_image_size=16", "self_supervision.batch_size_per_worker=4"]
    warm_up += ["self_supervision.num_epochs=6"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    made = job("preprocess", config_file, "name=mri", f"source={phantoms}", f"storage={whole}")
    assert result(made)["status"] == "ok"
    shutil.copytree(whole, killed)
    assert result(job("train", config_file, *warm_up, f"storage={whole}"))["status"] == "ok"

    process = job("train", config_file, *warm_up, f"storage={killed}")
    wait_for(lambda: len(list((killed / "encoders").glob("*/metrics.jsonl"))) == 1)
    kill_tree(process)
    (folder,) = (killed / "encoders").iterdir()
    done = Folder(folder).read_json_lines("metrics.jsonl")
    assert not (folder / "encoder.pt").exists()
    (folder / "checkpoint_manager_snapshot.json").write_text('{"half')

    assert result(job("train", config_file, *warm_up, f"storage={killed}"))["status"] == "ok"
    history = Folder(folder).read_json_lines("metrics.jsonl")
    assert [line["epoch"] for line in history] == [1, 2, 3, 4, 5, 6]
    assert history[: len(done)] == done
    assert not (folder / "state.pt").exists()
    one, two = (
        torch.load(storage / "encoders" / folder.name / "encoder.pt", weights_only=True)["encoder"]
        for storage in (whole, killed)
    )
    assert all(one[name].equal(two[name]) for name in one)


def test_a_second_job_is_refused_and_sigterm_ends_the_first_in_order(
    phantoms: Path, tmp_path: Path, config_file: Path
) -> None:
    made = result(job("preprocess", config_file, "name=mri", f"source={phantoms}"))
    assert made["status"] == "ok"
    assert result(job("train", config_file, "name=whole", "dataset=mri"))["status"] == "ok"
    first = job("train", config_file, "name=twice", "dataset=mri")
    wait_for(lambda: len(epochs_of(tmp_path, "twice")) >= 1)

    (trainer,) = workers_of(first, "ray::RayTrainWorker")
    trainer.suspend()  # or the run might be complete before the second job has started
    second = job("train", config_file, "name=twice", "dataset=mri")
    refused = result(second)
    trainer.resume()
    assert second.returncode == 2
    assert f"another job (process {first.pid} on" in refused["error"]
    assert "wait until it finishes, or choose another name" in refused["error"]

    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert_ends_in_order(first, signal.SIGTERM, tmp_path, "twice")

    assert result(job("train", config_file, "name=twice", "dataset=mri"))["status"] == "ok"
    assert epochs_of(tmp_path, "twice") == [1, 2, 3, 4, 5, 6]
    assert_same_weights(tmp_path, "whole", "twice")
    records = Folder(tmp_path / "runs" / "twice").read_json_lines("provenance.jsonl")
    assert len(records) == 2  # of the refused one there is none
    assert records[0]["first_epoch"] == 1
    assert records[1]["first_epoch"] > 1


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("stage", ["warm-up", "training"])
def test_ctrl_c_ends_a_job_in_order(
    stage: str, phantoms: Path, tmp_path: Path, config_file: Path
) -> None:
    made = result(job("preprocess", config_file, "name=mri", f"source={phantoms}"))
    assert made["status"] == "ok"
    warm_up = ["encoder.pretext=contrastive", "encoder.pretext_image_size=32"]
    pretext = [*warm_up, "self_supervision.num_epochs=200"] if stage == "warm-up" else []
    process = job("train", config_file, "name=cut", "dataset=mri", *pretext)
    epochs_at = "encoders/*/metrics.jsonl" if stage == "warm-up" else "runs/cut/metrics.jsonl"
    wait_for(lambda: bool(list(tmp_path.glob(epochs_at))) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that run in it
    assert_ends_in_order(process, signal.SIGINT, tmp_path, "cut")


def test_killed_preprocessing_workers_lose_no_slice(
    phantoms: Path, tmp_path: Path, config_file: Path
) -> None:
    settings = [f"source={phantoms}", "preprocess.files_per_task=1"]
    assert result(job("preprocess", config_file, "name=whole", *settings))["status"] == "ok"
    process = job("preprocess", config_file, "name=killed", *settings)
    killed = []

    def two_are_killed() -> bool:
        for worker in workers_of(process, "decode_part"):
            if worker.pid not in killed:
                worker.kill()
                killed.append(worker.pid)
        return len(killed) >= 2

    wait_for(two_are_killed)
    assert result(process)["status"] == "ok"
    whole, other = (
        ImageStore.open(Folder(tmp_path / "datasets" / name)) for name in ("whole", "killed")
    )
    assert whole.manifest.data_hash == other.manifest.data_hash
    assert whole.index().num_rows == other.index().num_rows
    assert other.manifest.num_rejected == whole.manifest.num_rejected


def test_preprocessing_workers_killed_for_want_of_memory_lose_no_slice(
    tmp_path: Path, config_file: Path
) -> None:
    source = tmp_path / "source"
    write_phantoms(source, num_training_per_class=100, num_testing_per_class=10, seed=5, size=64)
    settings = [f"source={source}", "name=whole"]
    assert result(job("preprocess", config_file, *settings))["status"] == "ok"
    limit = get_used_memory() + 6 * 2**30
    if limit + 2**30 > get_system_memory():
        pytest.skip("7 GB of memory have to be free")
    environment = {
        **os.environ,
        "RAY_memory_monitor_refresh_ms": "100",
        "RAY_memory_usage_threshold": str(limit / get_system_memory()),
    }
    log = tmp_path / "log"
    with log.open("w") as stream:
        settings = [f"source={source}", "name=killed", "preprocess.files_per_task=1"]
        process = job("preprocess", config_file, *settings, environment=environment, stderr=stream)
    wait_for(lambda: bool(workers_of(process, "decode_part")))
    others = []  # that take the machine's memory
    while get_used_memory() < limit + 2**28:
        others.append(b"\1" * 2**28)
    wait_for(lambda: _RAY_MESSAGE in log.read_text() or process.poll() is not None, timeout_s=120)
    others.clear()
    assert result(process)["status"] == "ok"
    assert _RAY_MESSAGE in log.read_text()
    whole, other = (
        ImageStore.open(Folder(tmp_path / "datasets" / name)) for name in ("whole", "killed")
    )
    assert whole.manifest.data_hash == other.manifest.data_hash
    assert other.manifest.num_rejected == whole.manifest.num_rejected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_while_a_store_is_written_leaves_the_old_store(
    phantoms: Path, tmp_path: Path, small_disk: Path, config_file: Path
) -> None:
    settings = ["name=mri", f"storage={small_disk}"]
    made = result(job("preprocess", config_file, f"source={phantoms}", *settings))
    assert made["status"] == "ok"
    store = small_disk / "datasets" / "mri"
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(max(0, free - 60_000)))
    more = tmp_path / "more"
    write_phantoms(more, num_training_per_class=60, num_testing_per_class=1, seed=8, size=64)
    shutil.copytree(phantoms, more, dirs_exist_ok=True)
    process = job("preprocess", config_file, f"source={more}", *settings)
    failed = result(process)
    assert process.returncode == 2
    assert "no space left to write" in failed["error"]
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    assert not (small_disk / "datasets" / ".mri.rebuilt").exists()
    (small_disk / "ballast").unlink()
    assert result(job("preprocess", config_file, f"source={more}", *settings))["status"] == "ok"
