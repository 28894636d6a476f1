"""Workers are placed on nodes, not on the sum of their CPUs."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray.data

from brainray.config import TrainConfig
from brainray.errors import ConfigError
from brainray.orchestration.blocks import arrow_blocks, blocks_on_actors, read_parts
from brainray.orchestration.resources import (
    KEEPING_MEMORY,
    QUIET,
    ActorResources,
    WorkerResources,
    plan_actors,
    plan_workers,
)
from brainray.storage import Folder

HEAD = {"CPU": 8.0, "memory": 1e9}
GPU_NODE = {"CPU": 8.0, "GPU": 1.0}
LAPTOP = {"CPU": 2.0}


def plan(nodes: list[dict[str, float]], **settings: object) -> WorkerResources:
    return plan_workers(TrainConfig.model_validate(settings), nodes)


def test_one_worker_takes_the_whole_laptop() -> None:
    assert plan([LAPTOP]) == WorkerResources(1, 2, gpus_per_worker=0, room=1)
    assert plan([LAPTOP], num_workers=2) == WorkerResources(2, 1, gpus_per_worker=0, room=2)


def test_every_gpu_gets_a_worker_with_the_cpus_of_its_own_node() -> None:
    assert plan([HEAD, GPU_NODE, GPU_NODE]) == WorkerResources(2, 8, gpus_per_worker=1, room=2)
    big = {"CPU": 16.0, "GPU": 4.0}
    assert plan([HEAD, GPU_NODE, big]) == WorkerResources(5, 4, gpus_per_worker=1, room=5)
    assert plan([HEAD, GPU_NODE], device="cpu") == WorkerResources(1, 8, gpus_per_worker=0, room=2)


@pytest.mark.parametrize(
    ("nodes", "num_workers", "cpus"),
    [
        ([{"CPU": 2.0}, {"CPU": 64.0}], 1, 64),  # a small head beside a large worker
        ([{"CPU": 64.0}, {"CPU": 2.0}], 2, 32),
        ([{"CPU": 1.0}, {"CPU": 16.0}], 6, 2),
        ([{"CPU": 16.0}, {"CPU": 16.0}], 3, 8),
        ([{"CPU": 2.0, "GPU": 4.0}, {"CPU": 64.0, "GPU": 8.0}], 2, 8),
    ],
)
def test_a_small_node_does_not_limit_workers_on_the_others(
    nodes: list[dict[str, float]], num_workers: int, cpus: int
) -> None:
    found = plan(nodes, num_workers=num_workers)
    assert found.cpus_per_worker == cpus
    assert found.room >= num_workers


def test_workers_that_share_a_gpu_share_its_cpus_too() -> None:
    shared = plan([HEAD, GPU_NODE, GPU_NODE], num_workers=1, gpus_per_worker=0.5)
    assert shared == WorkerResources(1, 4, gpus_per_worker=0.5, room=4)
    assert shared.resources_per_worker == {"CPU": 4.0, "GPU": 0.5}
    with pytest.raises(ConfigError, match=r"two of a run's 2 workers on one GPU"):
        plan([GPU_NODE], num_workers=2, gpus_per_worker=0.5)
    # Two of 0.6 do not fit on one.
    assert plan([GPU_NODE], num_workers=1, gpus_per_worker=0.6).room == 1


def test_a_head_without_cpus_to_give_takes_none_from_the_workers() -> None:
    """As on Kubernetes."""
    bare, node = {"memory": 1e9}, {"CPU": 16.0}
    assert plan([bare, node]) == WorkerResources(1, 16, gpus_per_worker=0, room=1)
    assert plan([{"CPU": 0.0}, node, node], num_workers=2).cpus_per_worker == 16


def test_what_no_node_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"64 workers .* has room for 2; lower"):
        plan([LAPTOP], num_workers=64)
    with pytest.raises(ConfigError, match=r"1 workers with 12 CPU.* has room for 0"):
        plan([HEAD, HEAD], num_workers=1, cpus_per_worker=12)
    with pytest.raises(ConfigError, match="has no GPU"):
        plan([HEAD], device="cuda")


def test_an_autoscaler_may_bring_what_is_requested_by_number() -> None:
    settings = {"device": "cuda", "num_workers": 4, "cpus_per_worker": 6, "wait_for_nodes": True}
    assert plan([HEAD], **settings) == WorkerResources(4, 6, gpus_per_worker=1, room=0)
    with pytest.raises(ConfigError, match=r"set train\.num_workers"):
        plan([HEAD], device="cuda", wait_for_nodes=True)


def test_the_number_of_workers_may_be_a_range() -> None:
    assert plan([LAPTOP], num_workers=2).num_workers_or_range == 2
    elastic = plan([LAPTOP], num_workers=4, min_workers=2, cpus_per_worker=1)
    assert elastic.num_workers_or_range == (2, 4)
    assert elastic.room == 2
    # Those that there are at first share all CPUs.
    assert plan([HEAD, HEAD], num_workers=40, min_workers=2, device="cpu").cpus_per_worker == 8
    with pytest.raises(ConfigError, match=r"3 workers .* has room for 2"):
        plan([LAPTOP], num_workers=4, min_workers=3, cpus_per_worker=1)
    with pytest.raises(ConfigError, match=r"min_workers=3 exceeds the number of workers \(2\)"):
        plan([LAPTOP], num_workers=2, min_workers=3)


def actors(
    nodes: list[dict[str, float]], *, one_per_node: bool = True, **settings: object
) -> ActorResources:
    config = TrainConfig.model_validate(settings)
    return plan_actors(config, nodes, one_per_node=one_per_node)


def test_actors_leave_a_cpu_to_the_tasks_that_read() -> None:
    assert actors([HEAD, HEAD]) == ActorResources(2, num_cpus=7)
    assert actors([HEAD], one_per_node=False) == ActorResources(7, num_cpus=1)
    assert actors([LAPTOP]) == ActorResources(1, num_cpus=1)
    assert actors([{"CPU": 1.0}]) == ActorResources(1, num_cpus=0)
    assert actors([{"CPU": 1.0}, {"CPU": 1.0}]) == ActorResources(1, num_cpus=1)
    assert actors([{"CPU": 0.0}, HEAD]) == ActorResources(1, num_cpus=7)


def test_a_small_node_does_not_make_the_actors_of_large_ones_small() -> None:
    assert actors([LAPTOP, HEAD]) == ActorResources(1, num_cpus=7)
    assert actors([{"CPU": 1.0}, {"CPU": 64.0}, {"CPU": 64.0}]) == ActorResources(2, num_cpus=63)
    assert actors([{"CPU": 4.0}, HEAD]) == ActorResources(2, num_cpus=3)


def test_actors_embed_where_training_would_train() -> None:
    assert actors([HEAD, GPU_NODE, GPU_NODE]) == ActorResources(2, num_gpus=1)
    assert actors([GPU_NODE], device="cpu") == ActorResources(1, num_cpus=7)
    assert (ActorResources(1, num_gpus=1).device, ActorResources(1).device) == ("cuda", "cpu")
    with pytest.raises(ConfigError, match="no GPU"):
        actors([HEAD], device="cuda")


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"OMP_NUM_THREADS": "1"}, "1"),
        ({"OMP_NUM_THREADS": "1", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "None"),
        (
            {
                "OMP_NUM_THREADS": "1",
                "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"env_vars": {"OMP_NUM_THREADS": "1"}}',
            },
            "1",
        ),
    ],
)
def test_a_submitted_driver_has_all_cores_unless_set_otherwise(
    environment: dict[str, str], threads: str
) -> None:
    program = "import brainray, os; print(os.environ.get('OMP_NUM_THREADS'))"
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert finished.stdout.strip() == threads, finished.stderr


class AddOne:
    def __init__(self, amount: int) -> None:
        self.amount = amount

    def __call__(self, block: pa.Table) -> pa.Table:
        return pa.table({"x": pc.add(block["x"], self.amount), "rows": [len(block)] * len(block)})


@pytest.mark.usefixtures("ray_cluster")
def test_columns_are_those_of_the_file_whatever_its_folders_are_called(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "split=grouped" / "frame=remove")
    table = pa.table({"split": ["train", "test"], "frame": ["", "f1"], "path": ["a", "b"]})
    folder.write_table("part.parquet", table)
    read = pa.concat_tables(arrow_blocks(read_parts(folder, ["split", "frame"])))
    assert read.to_pydict() == {"split": ["train", "test"], "frame": ["", "f1"]}


@pytest.mark.usefixtures("ray_cluster")
def test_actors_get_whole_blocks_also_on_gpus() -> None:
    blocks = [pa.table({"x": [1, 2, 3]}), pa.table({"x": [4]})]
    dataset = ray.data.from_arrow(blocks)
    on_cpu = blocks_on_actors(dataset, AddOne, {"amount": 1}, ActorResources(1))
    rows = sorted((row["x"], row["rows"]) for row in on_cpu.take_all())
    assert rows == [(2, 3), (3, 3), (4, 3), (5, 1)]
    # No GPU is here to run it; Ray's own map_batches would refuse it already now.
    blocks_on_actors(dataset, AddOne, {"amount": 1}, ActorResources(1, num_gpus=1))


def test_workers_on_cpus_keep_the_memory_that_a_step_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert plan([LAPTOP]).runtime_env == {"env_vars": QUIET | KEEPING_MEMORY}
    assert plan([GPU_NODE]).runtime_env == {"env_vars": QUIET}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
    assert plan([LAPTOP]).runtime_env == {"env_vars": QUIET}  # what the user has set stays


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_not_requested_again() -> None:
    """A block of 128 MB, touched, freed and asked for anew, by a thread as in Ray's workers."""
    program = """
import resource, threading
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    bytearray(2**27)
    before = faults()
    bytearray(2**27)
    print(faults() - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""

    def faults(environment: dict[str, str]) -> int:
        command = [sys.executable, "-c", program]
        return int(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)

    plain = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    # Not a number of pages: their size is the machine's.
    assert 10 * faults(plain | KEEPING_MEMORY) < faults(plain)
