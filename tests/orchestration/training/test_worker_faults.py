"""What happens within workers: each fault is really caused, in a real worker of a real run."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from mlflow import MlflowClient
from ray import cloudpickle

from brainray import layout
from brainray.config import Config
from brainray.engine import recluster, trainer
from brainray.engine.state import load_checkpoint, newest_readable_epoch
from brainray.errors import BrainrayError, ClusteringError, DataError, DivergenceError
from brainray.orchestration.training import driver, worker
from brainray.orchestration.training.driver import TrainedRun, train
from brainray.storage import Folder
from tests.conftest import tiny_config

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.faults]

# Workers cannot import this module: what it defines goes to them as it is.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

Fault = Callable[[Path], None]

TRAINER: Any = trainer
RECLUSTER: Any = recluster
"""The modules whose functions faults replace, in the worker's own process."""


def config_of(storage: Path, name: str, *overrides: str) -> Config:
    return tiny_config(
        storage,
        f"name={name}",
        "dataset=mri",
        "train.num_workers=2",
        "train.num_epochs=3",
        "train.batch_size_per_worker=4",
        "train.labelled_batch_size_per_worker=4",
        "evaluation.tsne_epochs=[]",
        *overrides,
    )


@pytest.fixture(scope="module")
def undisturbed(storage: Path) -> TrainedRun:
    return train(config_of(storage, "undisturbed"))


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault, once: Path) -> None:
    """Let every worker run ``fault`` before it trains, until the file ``once`` exists."""

    def faulty_worker(settings: dict[str, Any]) -> dict[str, str]:
        if not once.exists():
            fault(once)
        return worker.train_worker(settings)

    monkeypatch.setattr(driver, "train_worker", faulty_worker)


def rank() -> int:
    return int(ray.train.get_context().get_world_rank())


def kill_this_process(once: Path) -> None:
    once.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def assert_same_weights(one: TrainedRun, two: TrainedRun) -> None:
    for folder in (layout.LAST, layout.BEST):
        first, second = (load_checkpoint(run.run.folder / folder) for run in (one, two))
        assert first.epoch == second.epoch
        for name, value in first.encoder.state_dict().items():
            assert torch.equal(value, second.encoder.state_dict()[name]), name
    history = two.run.folder.read_json_lines(layout.METRICS)
    assert [metrics["epoch"] for metrics in history] == [1.0, 2.0, 3.0]
    expected = one.run.folder.read_json_lines(layout.METRICS)
    for before, after in zip(expected, history, strict=True):
        same = {key for key in before if not key.startswith("time/")}
        assert {key: before[key] for key in same} == {key: after[key] for key in same}


def kill_in_forward(once: Path) -> None:
    original = TRAINER.Encoder.forward
    calls = 0

    def forward(self: Any, images: torch.Tensor) -> Any:
        nonlocal calls
        calls += self.training
        if rank() == 1 and calls == 9:
            kill_this_process(once)
        return original(self, images)

    TRAINER.Encoder.forward = forward


def kill_in_collective(once: Path) -> None:
    original = TRAINER.dist.gather_rows
    calls = 0

    def gather_rows(rows: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += TRAINER.dist.world_size() > 1
        if rank() == 1 and calls == 20:
            time.sleep(2)  # the other rank is waiting by now
            kill_this_process(once)
        return original(rows)

    TRAINER.dist.gather_rows = gather_rows


def kill_in_checkpoint(once: Path) -> None:
    original = Folder.write_bytes

    def write_bytes(self: Folder, name: str, content: bytes) -> None:
        if name == layout.MODEL and self.uri.endswith(layout.checkpoint_folder(2)):
            self.filesystem.create_dir(self.path, recursive=True)
            with self.filesystem.open_output_stream(f"{self.path}/.{name}.tmp-1") as stream:
                stream.write(content[: len(content) // 2])
                stream.flush()
                kill_this_process(once)
        original(self, name, content)

    Folder.write_bytes = write_bytes  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", [kill_in_forward, kill_in_collective, kill_in_checkpoint])
def test_a_worker_killed_anywhere_costs_the_epoch_under_way_only(
    storage: Path,
    undisturbed: TrainedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    plant(monkeypatch, fault, tmp_path / "done")
    found = train(config_of(storage, fault.__name__.replace("_", "-")))
    assert (tmp_path / "done").exists()
    assert_same_weights(undisturbed, found)
    assert found.mlflow_run_id is not None
    client = MlflowClient(found.tracking_uri)
    logged = client.get_metric_history(found.mlflow_run_id, "train/loss/ce")
    assert [metric.step for metric in logged] == [1, 2, 3]


def fill_the_disk_in_epoch_3(once: Path) -> None:
    original = TRAINER.Trainer.run_epoch

    def run_epoch(self: Any) -> None:
        if self.epoch == 2 and rank() == 0:
            once.touch()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        original(self)

    TRAINER.Trainer.run_epoch = run_epoch


def test_a_full_disk_and_a_cut_checkpoint_leave_the_one_before(
    storage: Path,
    undisturbed: TrainedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = config_of(storage, "full-disk")
    with monkeypatch.context() as patch:
        plant(patch, fill_the_disk_in_epoch_3, tmp_path / "done")
        with pytest.raises(DataError, match="no space left to write"):
            train(config)
    folder = Folder(storage) / "runs" / "full-disk"
    assert newest_readable_epoch(folder) == 2
    model = storage / "runs" / "full-disk" / "epoch-0002" / layout.MODEL
    model.write_bytes(model.read_bytes()[:-1000])
    # Ray's own list of checkpoints may be cut by the full disk as well.
    (storage / "runs" / "full-disk" / "checkpoint_manager_snapshot.json").write_text('{"half')
    capfd.readouterr()
    assert_same_weights(undisturbed, train(config))
    deadline = time.monotonic() + 20  # workers' lines come through Ray's log monitor
    told = ""
    while "resuming run after epoch 1" not in told and time.monotonic() < deadline:
        time.sleep(0.5)
        told += capfd.readouterr().out
    assert "epoch-0002/model.pt is not a checkpoint" in told
    assert "resuming run after epoch 1" in told


def fill_the_disk_at_the_end(once: Path) -> None:
    original = TRAINER.Trainer.finish

    def finish(self: Any) -> None:
        if rank() == 0:
            once.touch()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        original(self)

    TRAINER.Trainer.finish = finish


def test_a_disk_that_fills_at_the_end_stops_all_ranks_and_keeps_the_last_epoch(
    storage: Path, undisturbed: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(storage, "full-at-the-end")
    with monkeypatch.context() as patch:
        plant(patch, fill_the_disk_at_the_end, tmp_path / "done")
        with pytest.raises(DataError, match="no space left to write"):
            train(config)
    assert newest_readable_epoch(Folder(storage) / "runs" / "full-at-the-end") == 3
    assert_same_weights(undisturbed, train(config))


def raise_on_one_rank(once: Path) -> None:
    def run_epoch(self: Any) -> None:
        if rank() == 1:
            raise RuntimeError("planted on rank 1")
        self._settle_batch_statistics()
        TRAINER.dist.sum_across_ranks(torch.ones(1))

    TRAINER.Trainer.run_epoch = run_epoch


def stay_away_on_one_rank(once: Path) -> None:
    def run_epoch(self: Any) -> None:
        if rank() == 1:
            time.sleep(3600)
        TRAINER.dist.sum_across_ranks(torch.ones(1))

    TRAINER.Trainer.run_epoch = run_epoch


@pytest.mark.parametrize(
    ("fault", "message"),
    [(raise_on_one_rank, "planted on rank 1"), (stay_away_on_one_rank, "(?i)timed ?out")],
)
def test_a_rank_that_fails_while_another_waits_ends_the_run_in_time(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, message: str
) -> None:
    plant(monkeypatch, fault, tmp_path / "never")
    settings = ["train.max_failures=0", "train.collective_timeout_s=15"]
    config = config_of(storage, fault.__name__.replace("_", "-"), *settings)
    started = time.monotonic()
    with pytest.raises(ray.train.TrainingFailedError, match=message):
        train(config)
    assert time.monotonic() - started < 120  # start-up, the time-out, and some reserve


def test_a_diverging_run_stops_with_epoch_step_and_slices(storage: Path) -> None:
    with pytest.raises(DivergenceError) as stop:
        train(config_of(storage, "diverging", "train.learning_rate=1e30"))
    text = str(stop.value)
    assert text.startswith("epoch 1, step ")
    named = text.partition("sample_id ")[2].split(":")[0].split(" and ")[0].split(", ")
    seen = Folder(storage) / "runs" / "diverging"
    assert set(named) <= set(seen.read_table(layout.SEEN)["sample_id"].to_pylist())
    assert "lower train.learning_rate" in text


@pytest.mark.parametrize("policy", ["warn", "reseed"])
def test_a_collapse_is_handled_as_the_config_says(storage: Path, policy: str) -> None:
    # No embeddings are spread so widely: a collapse that reseeding cannot mend.
    settings = ["clustering.min_spread=1.5", f"clustering.on_collapse={policy}"]
    config = config_of(storage, f"collapse-{policy}", "train.num_epochs=1", *settings)
    if policy == "reseed":
        with pytest.raises(
            BrainrayError, match=r"epoch 1, also after reseeding: .* have collapsed"
        ):
            train(config)
    else:
        found = train(config)
        (metrics,) = found.run.folder.read_json_lines(layout.METRICS)
        assert metrics["cluster/collapsed"] == 1.0


def gather_all_in_one_cluster(once: Path) -> None:
    """What is seen of the first re-clustering after epoch 1 is a collapse."""
    original = RECLUSTER.measure_health
    calls = 0

    def measure_health(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        health = original(*arguments)
        return RECLUSTER.ClusteringHealth(
            **vars(health) | {"largest_share": 1.0 if calls == 1 else 0.5}
        )

    RECLUSTER.measure_health = measure_health


def test_reseeding_helps_where_the_clusters_alone_have_collapsed(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, gather_all_in_one_cluster, tmp_path / "never")
    config = config_of(storage, "reseeded", "train.num_epochs=1", "clustering.on_collapse=reseed")
    (metrics,) = train(config).run.folder.read_json_lines(layout.METRICS)
    assert metrics["cluster/collapsed"] == 0.0
    with pytest.raises(ClusteringError, match="epoch 1: the clustering has collapsed"):
        train(config_of(storage, "not-reseeded", "train.num_epochs=1"))
