"""Progress of training as seen by the driver: a line per epoch, and MLflow."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Self

from brainray import layout
from brainray.config import SelfSupervisionConfig, TrainConfig
from brainray.engine.recipe import image_side
from brainray.log import log
from brainray.orchestration.resources import WorkerResources, alive_nodes
from brainray.schema import History, Metrics
from brainray.storage import Folder

POLL_S = 1.0
_ROOM_EVERY_S = 60.0


class Watcher(ABC):
    """Polls the workers' output every second and once more at the end of the block.

    Errors, such as storage that is temporarily unavailable, are logged; polling continues.
    """

    def __init__(self) -> None:
        self._last_problem = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    @abstractmethod
    def poll(self) -> None:
        """Handle what is new since the last call."""

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            self._poll_safely()
        self._poll_safely()

    def _poll_safely(self) -> None:
        try:
            self.poll()
        except Exception as error:  # must not stop the training
            problem = f"progress is temporarily unavailable: {type(error).__name__}: {error}"
            if problem != self._last_problem:
                log(problem)
            self._last_problem = problem


class Follower(Watcher):
    """Follows the metrics in a folder while workers train: a line per epoch or round."""

    def __init__(
        self,
        folder: Folder,
        line: Callable[[Metrics], str],
        send: Callable[[History], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self._folder = folder
        self._line = line
        self._send = send  # called with all metrics when there are others
        self._num_seen = len(folder.read_json_lines(layout.METRICS))

    def poll(self) -> None:
        history = self._folder.read_json_lines(layout.METRICS)
        if len(history) < self._num_seen:
            log(f"restarted after {step_name(history[-1])}" if history else "restarted")
        for metrics in history[self._num_seen :]:
            log(self._line(metrics))
        if len(history) != self._num_seen:
            self._send(history)
        self._num_seen = len(history)


def training_line(config: TrainConfig, metrics: Metrics) -> str:
    """What is logged of an epoch of a run."""
    shown = {
        "loss": "train/loss/total",
        "validation head": "validation/head/accuracy",
        "cluster": "validation/cluster/accuracy",
        "NMI vs previous": "cluster/nmi_previous",
    }
    values = ", ".join(
        f"{label} {metrics[name]:.3f}" for label, name in shown.items() if name in metrics
    )
    return (
        f"epoch {metrics['epoch']:.0f}/{config.num_epochs}: {values}; "
        f"{metrics['time/epoch_s']:.0f} s, {metrics['time/images_per_s']:.0f} images/s, "
        f"{time_left(metrics, config)} left"
    )


def pretraining_line(config: SelfSupervisionConfig, metrics: Metrics) -> str:
    """What is logged of an epoch or round of a self-supervised encoder."""
    losses = ", ".join(
        f"{name} {metrics[name]:.3f}" for name in ("pretext", "cluster") if name in metrics
    )
    seconds = metrics["seconds"]
    if "round" in metrics:
        return (
            f"{step_name(metrics)}/{config.max_rounds}: {losses}; "
            f"{metrics['changed_share']:.1%} of the slices changed cluster; {seconds:.0f} s"
        )
    left = timedelta(seconds=round(seconds * (config.num_epochs - metrics["epoch"])))
    return (
        f"pretext {step_name(metrics)}/{config.num_epochs}: {losses}; {seconds:.0f} s, {left} left"
    )


def step_name(metrics: Metrics) -> str:
    """The epoch, or in a refinement the round, that metrics are of."""
    unit = "round" if "round" in metrics else "epoch"
    return f"{unit} {metrics[unit]:.0f}"


class RoomFollower(Watcher):
    """Says once a minute if the nodes have too little room: Ray Train waits for more in silence."""

    def __init__(self, workers: WorkerResources) -> None:
        super().__init__()
        self._workers = workers
        self._next_look = time.monotonic()

    def poll(self) -> None:
        if time.monotonic() < self._next_look or self._stopped.is_set():
            return
        self._next_look = time.monotonic() + _ROOM_EVERY_S
        nodes = alive_nodes()
        shortage = self._workers.shortage(nodes)
        if shortage:
            log(
                f"waiting for nodes ({len(nodes)} alive): {shortage}; training goes on when they "
                "join, or end the job and submit it again with fewer workers "
                "(train.num_workers, train.min_workers)"
            )


def time_left(metrics: Metrics, config: TrainConfig) -> timedelta:
    """Time until the last epoch ends, assuming the same cost per pixel as in this one."""
    later = range(int(metrics["epoch"]) + 1, config.num_epochs + 1)
    pixels = sum(image_side(epoch, config) ** 2 for epoch in later)
    return timedelta(
        seconds=round(metrics["time/epoch_s"] * pixels / metrics["train/image_size"] ** 2)
    )
