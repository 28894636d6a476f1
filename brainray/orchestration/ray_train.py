"""Training on Ray Train: with little logging (followers log progress), with user errors passed on
unchanged, and resuming from our own files.
"""

import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import psutil
import pyarrow.fs as pafs
import ray
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn

from brainray.config import TrainConfig
from brainray.errors import (
    BrainrayError,
    UnreachableError,
    error_from_dict,
    error_to_dict,
    gpu_problem,
)
from brainray.orchestration.resources import WorkerResources
from brainray.storage import Folder

_RAY_CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
_RESIZE_INTERVAL_S = 60.0  # between checks for room for more workers

Settings = dict[str, Any]


def configure_ray_train() -> None:
    """Disable unneeded features of Ray Train, and waits; called before it starts workers."""
    # Lines that workers print must not be logged a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # By default a report, and the end of the training, is noticed after two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def ddp_options(device: torch.device) -> dict[str, Any]:
    """Options of `torch.nn.parallel.DistributedDataParallel`.

    On CPUs unused parameters are searched for, although there are none, because this keeps the
    gradients in their initial buckets. Otherwise DDP reorders them after its first step, and with
    three or more ranks a resumed run would sum them in a different order in its first step than an
    undisturbed one. On GPUs sums differ from run to run anyway. Buffers are not synchronised at
    every step: training does not read them, and `dist.share_buffers` does it where needed.
    """
    return {"find_unused_parameters": device.type == "cpu", "forward_sync_buffers": False}


def distributed(model: nn.Module) -> nn.Module:
    """The model, with gradients averaged over all ranks if there are several."""
    options = ddp_options(ray.train.torch.get_device())
    wrapped: nn.Module = ray.train.torch.prepare_model(model, parallel_strategy_kwargs=options)
    return wrapped


def configure_rank() -> None:
    """Set up a worker: little logging, and as many threads as reserved CPUs.

    Ray Train logs every report through a logger that its log level does not cover. With more
    threads, ranks on one node would starve each other.
    """
    logging.getLogger().setLevel(logging.WARNING)
    resources = ray.get_runtime_context().get_assigned_resources()
    threads = max(1, int(resources.get("CPU", 1)))
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    torch.backends.cudnn.benchmark = True  # slices and batches have few different shapes


def use_network_of_ray() -> None:
    """Make gloo use the interface that has the node's address in the Ray cluster.

    By default it listens at the address of the machine's name. Where that is 127.0.1.1, as in
    Debian's /etc/hosts, other machines would connect to themselves.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if address in [each.address for each in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # Ray exports no name for it
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_network_of_ray)  # before the process group is made
        super().on_start(worker_group, backend_config)


class _TorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def return_user_errors(work: Callable[[Settings], None]) -> Callable[[Settings], dict[str, str]]:
    """Decorate a worker function for `train_on_workers`.

    A BrainrayError is returned, not raised: Ray would treat an exception as a lost worker and
    restart it, which only helps if storage cannot be reached for a while.
    """

    @functools.wraps(work)
    def worker(settings: Settings) -> dict[str, str]:
        try:
            work(settings)
        except UnreachableError:
            raise
        except BrainrayError as error:
            return error_to_dict(error)
        return {}

    return worker


def train_on_workers(
    worker: Callable[[Settings], dict[str, str]],
    settings: Settings,
    *,
    folder: Folder,
    workers: WorkerResources,
    config: TrainConfig,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run ``worker(settings)`` on every rank.

    Args:
        worker: function decorated with `return_user_errors`.
        settings: plain values.
        folder: folder of the run or encoder, for the results.
        workers: number of workers and resources of each.
        config: timeouts and number of retries.
        callbacks: Ray Train's ``UserCallback``s.

    Raises:
        BrainrayError: the error that a worker returned, with its original type.
        ray.train.TrainingFailedError: workers were lost more often than ``train.max_failures``.
    """
    configure_ray_train()
    train_loop: Any = worker  # Ray's annotation forbids the return value that Result carries
    scaling: Any = ScalingConfig  # type checkers see Ray Train V1's class
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=settings,
        torch_config=_TorchConfig(timeout_s=config.collective_timeout_s),
        scaling_config=scaling(
            num_workers=workers.num_workers_or_range,
            use_gpu=workers.use_gpu,
            resources_per_worker=workers.resources_per_worker,
            elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # its types are those of V1
            name=folder.name,
            **ray_storage(folder.parent),
            worker_runtime_env=workers.runtime_env,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=list(callbacks),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    _delete_rays_checkpoint_list(folder)
    run_trainer(trainer)


def ray_storage(folder: Folder) -> dict[str, Any]:
    """Arguments of a RunConfig of Ray Train or Tune that make it store its files in ``folder``.

    Ray creates its folder, for which pyarrow writes an empty object for every part of an S3 key,
    also above the storage, where this user may not write. With an option that URIs cannot have, it
    first looks which of these objects exist.
    """
    s3 = folder.filesystem
    if isinstance(s3, pafs.S3FileSystem):
        _, (options,) = s3.__reduce__()
        looking = pafs.S3FileSystem(**options | {"check_directory_existence_before_creation": True})
        if looking == s3:  # not if the URI has an option that is lost in pickling
            return {"storage_path": folder.path, "storage_filesystem": looking}
    return {"storage_path": folder.arrow_uri}


def run_trainer(trainer: TorchTrainer) -> None:
    """Train, then restore the handler of Ctrl-C, which Ray Train does not.

    Raises:
        BrainrayError: the error that a worker returned, with its original type.
        ConfigError: PyTorch cannot use the GPUs that Ray detected, or they have too little memory.
        ray.train.TrainingFailedError: workers were lost more often than allowed.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        problem = _error_of_worker(error) or gpu_problem(str(error))
        if problem is not None:
            raise problem from error
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
    if result.return_value:
        raise error_from_dict(result.return_value)


def _error_of_worker(failure: TrainingFailedError) -> BrainrayError | None:
    """The first error among those of the workers that a user can act on."""
    errors = getattr(failure, "worker_failures", {}).values()
    causes = (getattr(error, "_base_exc", error) for error in errors)  # without Ray's traceback
    return next((cause for cause in causes if isinstance(cause, BrainrayError)), None)


def _delete_rays_checkpoint_list(folder: Folder) -> None:
    """Delete Ray's list of checkpoints before an attempt: we resume from the files in the folder,
    and a list that is truncated, since Ray does not write it atomically, would stop the attempt.
    """
    folder.delete_file(_RAY_CHECKPOINT_LIST, missing_ok=True)
