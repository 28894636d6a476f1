"""How many workers train, and with what, from the config and the nodes of the Ray cluster."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data

from brainray.config import TrainConfig
from brainray.errors import ConfigError, RoomError

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # else DDP doubts its options in every run

KEEPING_MEMORY = {
    "GLIBC_TUNABLES": ":".join(
        [
            "glibc.malloc.arena_max=1",  # other threads' heaps cannot hold blocks above 64 MB
            "glibc.malloc.mmap_threshold=1099511627776",
            "glibc.malloc.trim_threshold=1099511627776",
            "glibc.malloc.hugetlb=1",
        ]
    )
}
"""Environment of a process that trains on CPUs: freed memory is kept for the next step.

Every step frees and asks for the same hundreds of MB. By default glibc gives them back to the
kernel, which hands out zeroed pages anew: a sixth of a step. Read when a process starts; other
C libraries do not look at it. `jobs/benchmark.py training` measures what it gains.
"""

NodeResources = Mapping[str, float]
"""What one node has, as Ray tells it: ``{"CPU": 8.0, "GPU": 1.0, ...}``."""


@dataclass(frozen=True)
class WorkerResources:
    """A worker group that the Ray cluster can hold."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: float  # 0 where training is on CPUs
    room: int
    """Workers of this kind that the cluster's nodes hold together."""
    min_workers: int = 0
    """Where their number may change, the least; 0 where it is fixed."""

    @property
    def asked_for(self) -> int | tuple[int, int]:
        """Number of workers, or the least and the most, as Ray Train takes them."""
        return (self.min_workers, self.num_workers) if self.min_workers else self.num_workers

    @property
    def use_gpu(self) -> bool:
        return self.gpus_per_worker > 0

    @property
    def of_worker(self) -> dict[str, float]:
        """What Ray reserves for each worker."""
        cpus = {"CPU": float(self.cpus_per_worker)}
        return cpus | ({"GPU": self.gpus_per_worker} if self.use_gpu else {})

    @property
    def runtime_env(self) -> dict[str, dict[str, str]]:
        """What each worker's process is started with; the user's own variables stay."""
        variables = QUIET | ({} if self.use_gpu else KEEPING_MEMORY)
        return {"env_vars": {k: v for k, v in variables.items() if k not in os.environ}}


def plan_workers(config: TrainConfig, nodes: Sequence[NodeResources]) -> WorkerResources:
    """Fill in what the config leaves to the Ray cluster, and check that it fits on its nodes.

    Raises:
        ConfigError: the nodes cannot hold the workers (RoomError), for which Ray would wait for
            ever, or settings that contradict one another.
    """
    num_gpus, waits = _num_gpus(nodes), config.wait_for_nodes
    use_gpu = _use_gpus(config, num_gpus)
    gpus = config.gpus_per_worker if use_gpu else 0.0
    num_workers = config.num_workers or (num_gpus if use_gpu else 1)
    if num_workers == 0:
        raise ConfigError("train.wait_for_nodes needs train.num_workers: there is no GPU to count")
    if config.min_workers > num_workers:
        raise ConfigError(
            f"train.min_workers={config.min_workers} exceeds the {num_workers} of "
            "train.num_workers: lower it"
        )
    needed = config.min_workers or num_workers
    eligible = [node for node in nodes if not use_gpu or node.get("GPU", 0) >= 1]
    cpus = config.cpus_per_worker or _share_of_cpus(eligible, num_workers, gpus)
    room = sum(_workers_that_fit(node, cpus, gpus) for node in eligible)
    if use_gpu and gpus < 1 and num_workers > 1:
        raise ConfigError(
            f"train.gpus_per_worker={gpus:g} could put two of a run's {num_workers} workers on one "
            "GPU, which NCCL refuses: set train.num_workers=1 (trials of a sweep share GPUs so) or "
            "train.gpus_per_worker=1"
        )
    if room < needed and not waits:
        needs = f"{cpus} CPU(s)" + (f" and {gpus:g} GPU(s)" if use_gpu else "")
        raise RoomError(
            f"{needed} workers with {needs} each do not fit: the Ray cluster has room for "
            f"{room}; lower train.num_workers or train.cpus_per_worker, or set "
            "train.wait_for_nodes=true where an autoscaler brings more"
        )
    if waits:
        room = max(room, num_workers)
    return WorkerResources(num_workers, cpus, gpus, room, config.min_workers)


@dataclass(frozen=True)
class ActorResources:
    """Actors that each hold a model, and what Ray reserves for each of them."""

    num_actors: int
    num_cpus: int = 0
    num_gpus: int = 0


def plan_actors(
    config: TrainConfig, nodes: Sequence[NodeResources], *, one_per_node: bool
) -> tuple[str, ActorResources]:
    """The device of actors that embed, as training would choose it, and their resources.

    There is one on every GPU; without GPUs on every node, which leaves it one CPU, or on every CPU
    but one. The only CPU of a Ray cluster is left to the tasks that read: they would wait for ever.

    Raises:
        ConfigError: ``train.device=cuda``, and no GPU to wait for.
    """
    num_gpus = _num_gpus(nodes)
    if _use_gpus(config, num_gpus):
        return "cuda", ActorResources(max(1, num_gpus), num_gpus=1)
    counts = [count for node in nodes if (count := int(node.get("CPU", 0))) > 0]
    if sum(counts) <= 1:
        return "cpu", ActorResources(1)
    if one_per_node:
        num_cpus = max(1, min(counts) - 1)
        num_actors = min(len(counts), (sum(counts) - 1) // num_cpus)
        return "cpu", ActorResources(num_actors, num_cpus)
    return "cpu", ActorResources(sum(counts) - 1, num_cpus=1)


def blocks_on_actors(
    dataset: ray.data.Dataset,
    actor: type,
    arguments: Mapping[str, Any],
    resources: ActorResources,
    *,
    memory: float | None = None,
) -> ray.data.Dataset:
    """The data set's blocks, each as it is, through actors that are built of these arguments.

    ``map_batches`` refuses whole blocks where GPUs are asked for, and with a size of batches would
    part a file's slices; ``map_groups`` goes this way, too.

    Args:
        dataset: of Arrow blocks.
        actor: its ``__call__`` takes a table and returns one.
        arguments: of its constructor.
        resources: how many actors there may be, and what Ray reserves for each.
        memory: that Ray reserves for each, in bytes.
    """
    # Of few blocks, one actor would take all before another GPU had its own.
    at_first = resources.num_actors if resources.num_gpus else 1
    return dataset.map_batches_internal(
        actor,
        fn_constructor_kwargs=dict(arguments),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=at_first, max_size=resources.num_actors),
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        memory=memory,
    )


def alive_nodes() -> list[NodeResources]:
    """What each node of the Ray cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _num_gpus(nodes: Sequence[NodeResources]) -> int:
    return sum(int(node.get("GPU", 0)) for node in nodes)


def _use_gpus(config: TrainConfig, num_gpus: int) -> bool:
    if config.device == "cuda" and num_gpus == 0 and not config.wait_for_nodes:
        raise ConfigError(
            "train.device=cuda, but the Ray cluster has no GPU: set train.device=auto, or "
            "train.wait_for_nodes=true where an autoscaler brings some"
        )
    return config.device == "cuda" or (config.device == "auto" and num_gpus > 0)


def _share_of_cpus(nodes: Sequence[NodeResources], num_workers: int, gpus: float) -> int:
    """CPUs of a worker when every node's are shared among the workers that it will hold."""
    nodes = [node for node in nodes if node.get("CPU", 0) >= 1]  # a head may have none to give
    if not nodes:
        return 1
    evenly = -(-num_workers // len(nodes))
    shares = [
        int(node.get("CPU", 0)) // (int(node["GPU"]) * int(1 / gpus) if gpus else evenly)
        for node in nodes
    ]
    return max(1, min(shares))


def _workers_that_fit(node: NodeResources, cpus: int, gpus: float) -> int:
    by_cpu = int(node.get("CPU", 0)) // cpus
    # A GPU is shared by whole workers: two of 0.6 do not fit on one.
    return min(by_cpu, int(node.get("GPU", 0)) * int(1 / gpus)) if gpus else by_cpu
