"""What every training asks of Ray Train: few logs, since progress is told by the followers, and to
go on from our own files.
"""

import logging
import os

from ray.train import LoggingConfig

from brainray.storage import Folder

_RAYS_LIST = "checkpoint_manager_snapshot.json"

OF_RAY_TRAIN = LoggingConfig(log_level="WARNING")


def print_once() -> None:
    """Before Ray Train starts workers: a line that they print is not to be logged besides."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")


def quiet_worker() -> None:
    """In a worker: Ray Train tells every report through a logger that its own level misses."""
    logging.getLogger().setLevel(logging.WARNING)


def forget_rays_checkpoints(folder: Folder) -> None:
    """Before an attempt: what lies in the folder tells what to go on from. Ray's own list, which is
    not written whole or not at all, would stop the attempt if it were cut.
    """
    folder.delete_file(_RAYS_LIST, missing_ok=True)
