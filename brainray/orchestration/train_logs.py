"""Ray Train's logs, kept to what a user can act on: progress is told by the followers."""

import logging
import os

from ray.train import LoggingConfig

OF_RAY_TRAIN = LoggingConfig(log_level="WARNING")


def print_once() -> None:
    """Before Ray Train starts workers: a line that they print is not to be logged besides."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")


def quiet_worker() -> None:
    """In a worker: Ray Train tells every report through a logger that its own level misses."""
    logging.getLogger().setLevel(logging.WARNING)
