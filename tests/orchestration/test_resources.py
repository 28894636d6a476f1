"""Workers are placed on nodes, not on the sum of their CPUs."""

import pytest

from brainray.config import TrainConfig
from brainray.errors import ConfigError
from brainray.orchestration.resources import WorkerResources, plan_workers

HEAD = {"CPU": 8.0, "memory": 1e9}
GPU_NODE = {"CPU": 8.0, "GPU": 1.0}
LAPTOP = {"CPU": 2.0}


def plan(nodes: list[dict[str, float]], **settings: object) -> WorkerResources:
    return plan_workers(TrainConfig.model_validate(settings), nodes)


def test_one_worker_takes_the_whole_laptop() -> None:
    assert plan([LAPTOP]) == WorkerResources(1, 2, use_gpu=False)
    assert plan([LAPTOP], num_workers=2) == WorkerResources(2, 1, use_gpu=False)


def test_every_gpu_gets_a_worker_with_the_cpus_of_its_own_node() -> None:
    assert plan([HEAD, GPU_NODE, GPU_NODE]) == WorkerResources(2, 8, use_gpu=True)
    big = {"CPU": 16.0, "GPU": 4.0}
    assert plan([HEAD, GPU_NODE, big]) == WorkerResources(5, 4, use_gpu=True)
    assert plan([HEAD, GPU_NODE], device="cpu") == WorkerResources(1, 8, use_gpu=False)


def test_what_no_node_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"64 workers .* has room for 2; lower"):
        plan([LAPTOP], num_workers=64)
    with pytest.raises(ConfigError, match=r"1 workers with 12 CPU.* has room for 0"):
        plan([HEAD, HEAD], num_workers=1, cpus_per_worker=12)
    with pytest.raises(ConfigError, match="has no GPU"):
        plan([HEAD], device="cuda")


def test_an_autoscaler_may_bring_what_is_asked_for_by_number() -> None:
    asked = {"device": "cuda", "num_workers": 4, "cpus_per_worker": 6, "wait_for_nodes": True}
    assert plan([HEAD], **asked) == WorkerResources(4, 6, use_gpu=True)
    with pytest.raises(ConfigError, match=r"needs train\.num_workers"):
        plan([HEAD], device="cuda", wait_for_nodes=True)
