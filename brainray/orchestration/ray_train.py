"""Trainings on Ray Train: few logs, since progress is told by the followers, errors that a user can
act on told as what they are, and to go on from our own files.
"""

import functools
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
import ray
import torch
from ray.train import (
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn

from brainray import dist, errors
from brainray.config import TrainConfig
from brainray.errors import BrainrayError, ConfigError
from brainray.orchestration.own_head import WITHOUT_PREEMPTION
from brainray.orchestration.resources import WorkerResources
from brainray.storage import Folder

_RAYS_LIST = "checkpoint_manager_snapshot.json"
_NO_CUDA = "ProcessGroupNCCL is only supported with GPUs"  # PyTorch's words
_RESIZE_INTERVAL_S = 60.0  # between looks for room for more workers

Settings = dict[str, Any]


def settle_ray_train() -> None:
    """Before Ray Train starts workers: what it is to leave out."""
    # A line that workers print is not to be logged besides.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if "RAY_ADDRESS" not in os.environ:  # a Ray of our own, on this machine alone
        for name, value in WITHOUT_PREEMPTION.items():
            os.environ.setdefault(name, value)


def ddp_options(device: torch.device) -> dict[str, Any]:
    """Of `torch.nn.parallel.DistributedDataParallel`.

    On CPUs every parameter is looked for in the graph, though none is unused: it keeps the
    gradients in the buckets that they begin in. Else DDP orders them anew after its first step, and
    three ranks or more would sum them in another order in the first step of a run that goes on than
    one that was not disturbed; on GPUs sums differ from run to run anyway. Buffers are not shared
    at every step: training reads none, and `dist.share_buffers` does so where something will.
    """
    return {"find_unused_parameters": device.type == "cpu", "forward_sync_buffers": False}


def distributed(model: nn.Module) -> nn.Module:
    """The model with gradients averaged over all ranks, where there are several."""
    options = ddp_options(ray.train.torch.get_device())
    wrapped: nn.Module = ray.train.torch.prepare_model(model, parallel_strategy_kwargs=options)
    return wrapped


def settle_rank() -> None:
    """In a worker: few logs, and as many threads as CPUs were reserved.

    Ray Train tells every report through a logger that its own level misses; ranks on one node
    would starve each other.
    """
    logging.getLogger().setLevel(logging.WARNING)
    resources = ray.get_runtime_context().get_assigned_resources()
    threads = max(1, int(resources.get("CPU", 1)))
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)


def returning_errors(work: Callable[[Settings], None]) -> Callable[[Settings], dict[str, str]]:
    """What every rank does, for `train_on_workers`.

    An error that a user can act on is returned, not raised: Ray would take a raised one for a
    lost worker and start again.
    """

    @functools.wraps(work)
    def worker(settings: Settings) -> dict[str, str]:
        try:
            work(settings)
        except BrainrayError as error:
            return _told(error)
        return {}

    return worker


@contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """Raise one rank's error on every rank: the others would wait for it in a collective."""
    problem: BrainrayError | None = None
    try:
        yield
    except BrainrayError as error:
        problem = error
    told = b"" if problem is None else json.dumps(_told(problem)).encode()
    line = torch.tensor(list(told + b"\n"), dtype=torch.uint8, device=device)
    lines = bytes(dist.gather_rows(line).tolist()).splitlines()
    if problem is not None:
        raise problem
    for told in filter(None, lines):
        raise _as_raised(json.loads(told))


def _told(error: BrainrayError) -> dict[str, str]:
    return {"error": type(error).__name__, "message": str(error)}


def _as_raised(told: dict[str, str]) -> BrainrayError:
    error_class: type[BrainrayError] = getattr(errors, told["error"], BrainrayError)
    return error_class(told["message"])


def train_on_workers(
    worker: Callable[[Settings], dict[str, str]],
    settings: Settings,
    *,
    folder: Folder,
    workers: WorkerResources,
    config: TrainConfig,
    callbacks: Sequence[Any] = (),
) -> None:
    """Do ``worker(settings)`` on every rank; what it leaves goes to the folder.

    Args:
        worker: `returning_errors` of a function.
        settings: plain values.
        folder: of the run or encoder.
        workers: how many there are, and what each has.
        config: how patient to be.
        callbacks: Ray Train's ``UserCallback``s.

    Raises:
        BrainrayError: that a worker has returned, as what it was.
        ray.train.TrainingFailedError: workers were lost more often than ``train.max_failures``.
    """
    settle_ray_train()
    train_loop: Any = worker  # Ray's annotation forbids the return value that Result carries
    scaling: Any = ScalingConfig  # type checkers see the one of Ray Train's first version
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=settings,
        torch_config=TorchConfig(timeout_s=config.collective_timeout_s),
        scaling_config=scaling(
            num_workers=workers.asked_for,
            use_gpu=workers.use_gpu,
            resources_per_worker=workers.of_worker,
            elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # its types are of the older one
            name=folder.name,
            storage_path=str(folder.parent),
            worker_runtime_env=workers.runtime_env,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=list(callbacks),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    _forget_rays_checkpoints(folder)
    run_trainer(trainer)


def run_trainer(trainer: TorchTrainer) -> None:
    """Train to the end; afterwards Ctrl-C does again what it did before, which Ray Train forgets.

    Raises:
        BrainrayError: that a worker has returned, as what it was.
        ConfigError: PyTorch cannot use the GPUs that Ray has found.
        ray.train.TrainingFailedError: workers were lost more often than is allowed.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        if _NO_CUDA in str(error):  # said before any code of ours runs in a worker
            raise ConfigError(
                "Ray has found GPUs that PyTorch cannot use on the workers' nodes: mend the driver "
                "or install PyTorch with CUDA there, or set train.device=cpu"
            ) from error
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
    if result.return_value:
        raise _as_raised(result.return_value)


def _forget_rays_checkpoints(folder: Folder) -> None:
    """Before an attempt: what lies in the folder tells what to go on from. Ray's own list, which is
    not written whole or not at all, would stop the attempt if it were cut.
    """
    folder.delete_file(_RAYS_LIST, missing_ok=True)
