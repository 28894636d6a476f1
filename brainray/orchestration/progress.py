"""Progress of training as the driver sees it: a line an epoch, and MLflow."""

import threading
from collections.abc import Callable
from datetime import timedelta

from brainray import layout
from brainray.engine.evaluate import Metrics
from brainray.orchestration.run import Run
from brainray.tracking import LenientTracker

Log = Callable[[str], None]

_POLL_S = 1.0


class Follower:
    """Watches the run's metrics while workers train: a line an epoch, and MLflow."""

    def __init__(self, num_epochs: int, run: Run, tracker: LenientTracker, log: Log) -> None:
        self._num_epochs = num_epochs
        self._run = run
        self._tracker = tracker
        self._log = log
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._num_seen = len(run.folder.read_json_lines(layout.METRICS))

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # What is there by now is still handled.
        self._stopped.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stopped.wait(_POLL_S):
            self._handle_new_epochs()
        self._handle_new_epochs()

    def _handle_new_epochs(self) -> None:
        history = self._run.folder.read_json_lines(layout.METRICS)
        for metrics in history[self._num_seen :]:
            self._log(self._line(metrics))
        if len(history) > self._num_seen:
            self._tracker.log_epochs(history)
        self._num_seen = len(history)

    def _line(self, metrics: Metrics) -> str:
        epoch, total = int(metrics["epoch"]), self._num_epochs
        seconds = metrics["time/epoch_s"]
        shown = {
            "loss": "train/loss/total",
            "validation head": "validation/head/accuracy",
            "cluster": "validation/cluster/accuracy",
            "nmi to previous": "cluster/nmi_previous",
        }
        figures = ", ".join(
            f"{label} {metrics[name]:.3f}" for label, name in shown.items() if name in metrics
        )
        left = timedelta(seconds=round(seconds * (total - epoch)))
        speed = metrics["time/images_per_s"]
        return (
            f"epoch {epoch}/{total}: {figures}; {seconds:.0f} s, {speed:.0f} images/s, {left} left"
        )
