"""Number and resources of workers, from the config and the nodes of the Ray cluster."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
import ray.data

from brainray.config import TrainConfig
from brainray.errors import ConfigError, RoomError

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # otherwise DDP warns about its options in every run

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

Every step frees and allocates the same hundreds of MB. By default glibc returns them to the kernel,
which must zero the pages again: a sixth of the step time. Read when a process starts; ignored by
other C libraries. `jobs/benchmark.py training` measures the gain.
"""

NodeResources = Mapping[str, float]
"""Resources of one node as reported by Ray: ``{"CPU": 8.0, "GPU": 1.0, ...}``."""


@dataclass(frozen=True)
class WorkerResources:
    """A worker group that fits on the Ray cluster."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: float  # 0 for training on CPUs
    room: int
    """Number of such workers that fit on the cluster's present nodes."""
    min_workers: int = 0
    """Minimum number of workers if it may change; 0 if it is fixed."""

    @property
    def num_workers_or_range(self) -> int | tuple[int, int]:
        """Number of workers, or the minimum and the maximum, for Ray Train."""
        return (self.min_workers, self.num_workers) if self.min_workers else self.num_workers

    @property
    def use_gpu(self) -> bool:
        return self.gpus_per_worker > 0

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """Resources that Ray reserves for each worker."""
        cpus = {"CPU": float(self.cpus_per_worker)}
        return cpus | ({"GPU": self.gpus_per_worker} if self.use_gpu else {})

    @property
    def runtime_env(self) -> dict[str, dict[str, str]]:
        """Runtime environment of the workers; variables set by the user are not overridden."""
        variables = QUIET | ({} if self.use_gpu else KEEPING_MEMORY)
        return {"env_vars": {k: v for k, v in variables.items() if k not in os.environ}}

    def shortage(self, nodes: Sequence[NodeResources]) -> str:
        """What nodes lack to hold as many workers as training needs; empty if they do not."""
        room = _room(nodes, self.cpus_per_worker, self.gpus_per_worker)
        needed = self.min_workers or self.num_workers
        if room >= needed:
            return ""
        needs = f"{self.cpus_per_worker} CPU(s)"
        needs += f" and {self.gpus_per_worker:g} GPU(s)" if self.use_gpu else ""
        return f"{needed} workers with {needs} each do not fit: the Ray cluster has room for {room}"


def plan_workers(config: TrainConfig, nodes: Sequence[NodeResources]) -> WorkerResources:
    """Derive the settings that the config leaves open, and check that the workers fit.

    Raises:
        ConfigError: the workers do not fit on the nodes (RoomError), in which case Ray would wait
            forever, or settings contradict each other.
    """
    num_gpus, waits = _num_gpus(nodes), config.wait_for_nodes
    use_gpu = _use_gpus(config, num_gpus)
    gpus = config.gpus_per_worker if use_gpu else 0.0
    num_workers = config.num_workers or (num_gpus if use_gpu else 1)
    if num_workers == 0:
        raise ConfigError(
            "train.wait_for_nodes: there is no GPU yet from which to derive the number of workers; "
            "set train.num_workers"
        )
    if config.min_workers > num_workers:
        raise ConfigError(
            f"train.min_workers={config.min_workers} exceeds the number of workers "
            f"({num_workers}): lower it or raise train.num_workers"
        )
    needed = config.min_workers or num_workers
    eligible = [node for node in nodes if not use_gpu or node.get("GPU", 0) >= 1]
    cpus = config.cpus_per_worker or (
        _share_of_cpus(eligible, num_workers, gpus) or _share_of_cpus(eligible, needed, gpus) or 1
    )
    if use_gpu and gpus < 1 and num_workers > 1:
        raise ConfigError(
            f"train.gpus_per_worker={gpus:g} could put two of a run's {num_workers} workers on one "
            "GPU, which NCCL does not support: set train.num_workers=1 (so that trials of a sweep "
            "share GPUs) or train.gpus_per_worker=1"
        )
    room = _room(nodes, cpus, gpus)
    workers = WorkerResources(num_workers, cpus, gpus, room, config.min_workers)
    shortage = workers.shortage(nodes)
    if shortage and not waits:
        raise RoomError(
            f"{shortage}; lower train.num_workers or train.cpus_per_worker, or set "
            "train.wait_for_nodes=true if an autoscaler adds nodes"
        )
    return workers


@dataclass(frozen=True)
class ActorResources:
    """Number of actors with a model each, and the resources that Ray reserves per actor."""

    num_actors: int
    num_cpus: int = 0
    num_gpus: int = 0

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"


def plan_actors(
    config: TrainConfig, nodes: Sequence[NodeResources], *, one_per_node: bool
) -> ActorResources:
    """Resources of inference actors, on a device that is chosen as for training.

    There is one actor per GPU. Without GPUs, there is one per node that has at least half the CPUs
    of the largest, which leaves one CPU free, or one per CPU except one. If the Ray cluster has a
    single CPU, it is left to the reading tasks, which would otherwise wait forever.

    Raises:
        ConfigError: ``train.device=cuda``, but there is no GPU to wait for.
    """
    num_gpus = _num_gpus(nodes)
    if _use_gpus(config, num_gpus):
        return ActorResources(max(1, num_gpus), num_gpus=1)
    counts = [count for node in nodes if (count := int(node.get("CPU", 0))) > 0]
    if sum(counts) <= 1:
        return ActorResources(1)
    if one_per_node:
        # Actors are alike: a small head must not decide the size of those on large nodes.
        large = [count for count in counts if 2 * count >= max(counts)]
        num_cpus = max(1, min(large) - 1)
        num_actors = min(len(large), (sum(counts) - 1) // num_cpus)
        return ActorResources(num_actors, num_cpus)
    return ActorResources(sum(counts) - 1, num_cpus=1)


def alive_nodes() -> list[NodeResources]:
    """Resources of each live node of the Ray cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _num_gpus(nodes: Sequence[NodeResources]) -> int:
    return sum(int(node.get("GPU", 0)) for node in nodes)


def _use_gpus(config: TrainConfig, num_gpus: int) -> bool:
    if config.device == "cuda" and num_gpus == 0 and not config.wait_for_nodes:
        raise ConfigError(
            "train.device=cuda, but the Ray cluster has no GPU: set train.device=auto, or "
            "train.wait_for_nodes=true if an autoscaler adds GPU nodes"
        )
    return config.device == "cuda" or (config.device == "auto" and num_gpus > 0)


def _share_of_cpus(nodes: Sequence[NodeResources], num_workers: int, gpus: float) -> int:
    """The most CPUs per worker with which all workers fit; 0 if they do not fit.

    On a node with GPUs, at most an equal share if all its GPUs have workers.
    """
    max_workers = [int(node["GPU"]) * int(1 / gpus) if gpus else 1 for node in nodes]
    shares = [
        int(node.get("CPU", 0)) // count for node, count in zip(nodes, max_workers, strict=True)
    ]
    most = max(shares, default=0)
    return next(
        (cpus for cpus in range(most, 0, -1) if _room(nodes, cpus, gpus) >= num_workers),
        0,
    )


def _room(nodes: Sequence[NodeResources], cpus: int, gpus: float) -> int:
    """Number of workers that fit on the nodes."""
    return sum(_workers_that_fit(node, cpus, gpus) for node in nodes)


def _workers_that_fit(node: NodeResources, cpus: int, gpus: float) -> int:
    by_cpu = int(node.get("CPU", 0)) // cpus
    # A worker's share must be on one GPU: two workers with 0.6 each do not fit on one.
    return min(by_cpu, int(node.get("GPU", 0)) * int(1 / gpus)) if gpus else by_cpu
