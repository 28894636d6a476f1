"""What every training asks of Ray Train: few logs, since progress is told by the followers, and to
go on from our own files.
"""

import logging
import os
import signal
import threading
from typing import Any

from ray.train import LoggingConfig
from ray.train.torch import TorchTrainer

from brainray import errors
from brainray.errors import BrainrayError
from brainray.storage import Folder

_RAYS_LIST = "checkpoint_manager_snapshot.json"

OF_RAY_TRAIN = LoggingConfig(log_level="WARNING")


WITHOUT_PREEMPTION = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Where nobody takes nodes away: what watches for it is a process, and an error in Ray's log."""


def settle_ray_train() -> None:
    """Before Ray Train starts workers: what it is to leave out."""
    # A line that workers print is not to be logged besides.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if "RAY_ADDRESS" not in os.environ:  # a Ray of our own, on this machine alone
        for name, value in WITHOUT_PREEMPTION.items():
            os.environ.setdefault(name, value)


def quiet_worker() -> None:
    """In a worker: Ray Train tells every report through a logger that its own level misses."""
    logging.getLogger().setLevel(logging.WARNING)


def run_trainer(trainer: TorchTrainer) -> None:
    """Train to the end; afterwards Ctrl-C does again what it did before, which Ray Train forgets.

    Raises:
        BrainrayError: that a worker has returned, as what it was.
        ray.train.TrainingFailedError: workers were lost more often than is allowed.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        result: Any = trainer.fit()
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
    problem = result.return_value
    if problem:
        error_class = getattr(errors, problem["error"], BrainrayError)
        raise error_class(problem["message"])


def forget_rays_checkpoints(folder: Folder) -> None:
    """Before an attempt: what lies in the folder tells what to go on from. Ray's own list, which is
    not written whole or not at all, would stop the attempt if it were cut.
    """
    folder.delete_file(_RAYS_LIST, missing_ok=True)
