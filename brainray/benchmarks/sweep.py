"""Overhead of Tune and its tracking: trials of a sweep against the same runs started by hand."""

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from brainray import layout
from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.config import Config
from brainray.config_text import load_config
from brainray.errors import DataError
from brainray.log import log
from brainray.mri.phantom import write_phantoms
from brainray.orchestration.preprocessing.driver import preprocess
from brainray.orchestration.ray_connection import attach_to_ray
from brainray.orchestration.sweep.driver import sweep
from brainray.orchestration.training.driver import train

LEARNING_RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3)
MAX_OVERHEAD = 1.10


def run(options: CaseOptions) -> BenchmarkResult:
    """Four consecutive trials of a sweep against the same four runs started by hand.

    Both train on phantoms with all CPUs and send everything to MLflow. Start-up is the time until
    the first run begins, which includes Tune's start-up for the sweep. The runs last until the last
    one has written its summary. What follows is measured apart: by hand, the last run is sent to
    MLflow; the sweep also ends Tune, plots its figures and logs its best model, once for any number
    of trials.
    """
    attach_to_ray()
    num_slices, num_epochs = (80, 2) if options.quick else (300, 4)
    with tempfile.TemporaryDirectory(prefix="brainray-benchmark-") as temporary:
        storage = Path(temporary)
        log(f"generating {5 * num_slices} phantoms")
        write_phantoms(
            storage / "source",
            num_training_per_class=num_slices,
            num_testing_per_class=num_slices // 4,
            seed=options.seed,
            size=128,
        )
        config = _config(storage, num_epochs, options.seed)
        preprocess(config.model_copy(update={"name": "slices", "source": str(storage / "source")}))
        _by_hand(config, "warm-up", LEARNING_RATES[0])
        log("runs started by hand")
        started = time.time()  # comparable with file times
        for number, rate in enumerate(LEARNING_RATES):
            _by_hand(config, f"hand-{number}", rate)
        by_hand = _durations(storage, "hand-*", started)
        log("sweep")
        started = time.time()
        finished = sweep(config.model_copy(update={"name": "tuned"}))
        swept = _durations(storage, "tuned-*", started)
        num_complete = len(list(storage.glob(f"runs/tuned-*/{layout.SUMMARY}")))
    if num_complete < len(LEARNING_RATES):
        raise DataError(f"only {num_complete} trials were completed: see {finished.table}")
    spent = {"by hand": by_hand, "sweep": swept}
    return BenchmarkResult(
        [
            Measure("start-up by hand", by_hand.start_s, "s"),
            Measure("start-up of the sweep", swept.start_s, "s"),
            Measure("four runs by hand", by_hand.runs_s, "s"),
            Measure(
                "four trials against runs by hand",
                swept.runs_s / by_hand.runs_s,
                "x",
                at_most=MAX_OVERHEAD,
            ),
            Measure(
                "a trial beyond a run by hand",
                (swept.runs_s - by_hand.runs_s) / len(LEARNING_RATES),
                "s",
            ),
            Measure("after the last run by hand", by_hand.end_s, "s"),
            Measure("after the last trial", swept.end_s, "s"),
            Measure(
                "the sweep against runs by hand, all in all", swept.whole_s / by_hand.whole_s, "x"
            ),
        ],
        {"seconds": {name: asdict(found) for name, found in spent.items()}, "epochs": num_epochs},
    )


@dataclass(frozen=True)
class _Durations:
    """Seconds until the first run began, from then until the last was complete, and after it."""

    start_s: float
    runs_s: float
    end_s: float

    @property
    def whole_s(self) -> float:
        return self.start_s + self.runs_s + self.end_s


def _config(storage: Path, num_epochs: int, seed: int) -> Config:
    return load_config(
        None,
        [
            f"storage={storage}",
            f"seed={seed}",
            "dataset=slices",
            f"tracking.uri=sqlite:///{storage}/mlflow.db",
            "preprocess.image_size=64",
            "split.labelled_fraction=0.5",
            "train.image_size=64",
            f"train.num_epochs={num_epochs}",
            "train.num_workers=1",
            "evaluation.tsne_epochs=[]",
            "tune.algorithm=grid",
            "tune.scheduler=none",
            "tune.max_concurrent_trials=1",
            f"tune.space={{train.learning_rate: {{choice: {list(LEARNING_RATES)}}}}}",
        ],
    )


def _by_hand(config: Config, name: str, learning_rate: float) -> None:
    settings = config.train.model_copy(update={"learning_rate": learning_rate})
    train(config.model_copy(update={"name": name, "train": settings}))


def _durations(storage: Path, runs: str, started: float) -> _Durations:
    """Seconds of the stages since the start, from the modification times of the runs' files."""
    ended = time.time()
    begun = min(_times(storage, runs, layout.RUN))
    complete = max(_times(storage, runs, layout.SUMMARY), default=ended)
    return _Durations(begun - started, complete - begun, ended - complete)


def _times(storage: Path, runs: str, file: str) -> list[float]:
    return [path.stat().st_mtime for path in storage.glob(f"runs/{runs}/{file}")]
