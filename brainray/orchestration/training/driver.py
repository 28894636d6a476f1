"""The driver of a training: start or resume the run, fit, follow its progress, report."""

import shlex
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from brainray import layout
from brainray.config import WEIGHTS_OF_NO_SLICE, Config, EvaluationConfig
from brainray.engine.evaluate import summarise
from brainray.engine.recipe import build_objective
from brainray.engine.state import load_checkpoint
from brainray.log import log
from brainray.models.encoder import build_encoder
from brainray.orchestration.compared_runs import check_compared_runs
from brainray.orchestration.lock import held
from brainray.orchestration.pretraining.driver import starting_weights, warm_up
from brainray.orchestration.progress import Follower, RoomFollower, training_line
from brainray.orchestration.provenance import record_submission
from brainray.orchestration.publish import begin_tracking, how_to_open, send_run
from brainray.orchestration.ray_train import train_on_workers
from brainray.orchestration.resources import WorkerResources, alive_nodes, plan_workers
from brainray.orchestration.run import Run, groups_of_test_slices, run_to_resume
from brainray.orchestration.run_report import write_results
from brainray.orchestration.store import ImageStore, store_to_train_on
from brainray.orchestration.training.start import begin_run, check_run_fits
from brainray.orchestration.training.worker import train_worker
from brainray.schema import LABELLED, TRAIN, UNLABELLED_ROLE, VALIDATION, History, Metrics
from brainray.storage import Folder

_MAX_CLASS_SHIFT = 0.2
_FAR_MORE = 1.5  # times the requested share


@dataclass(frozen=True)
class TrainedRun:
    """A finished run and its reported metrics."""

    run: Run
    metrics: Metrics
    mlflow_run_id: str | None
    tracking_uri: str


@dataclass(frozen=True)
class Training:
    """A started or resumed run, and the workers that train it."""

    config: Config  # with the preprocessing and split of the store
    store: ImageStore
    run: Run
    workers: WorkerResources | None  # None if the run is complete


def train(config: Config, data_hash: str | None = None) -> TrainedRun:
    """Train the run ``config.name`` on the store ``config.dataset``, or resume it.

    With ``data_hash``, only on a store that still has these slices.

    Raises:
        BrainrayError: settings or data with which training cannot start, or a collapse.
        ray.train.TrainingFailedError: workers were lost more often than ``train.max_failures``.
    """
    with begun_training(config, data_hash) as training:
        config, run = training.config, training.run
        tracker = begin_tracking(config, run)
        if not run.is_complete:
            tracker.running()
            with tracker.ended_by_errors():
                line = partial(training_line, config.train)
                with Follower(run.folder, line, tracker.log_epochs):
                    fit(training)
                complete_run(training)
        elif _names_other_runs(config.evaluation, run):
            log(
                f"{run.folder} is complete: to compare it with other runs, rewrite its report with "
                f"jobs/report.py --set run={config.name} evaluation.control=..."
            )
        metrics = run.folder.read_json(layout.SUMMARY)
        send_run(run, tracker)
    if tracker.problem is not None:
        log(
            f"MLflow did not receive everything; it is kept in {run.folder}: send it later with "
            f"python jobs/track.py --set run={config.name} "
            + shlex.quote(f"storage={config.storage}")
        )
    return TrainedRun(run, metrics, tracker.mlflow_run_id, tracker.uri)


def _names_other_runs(evaluation: EvaluationConfig, run: Run) -> bool:
    """Whether the config compares the run with different runs from those it was started with."""
    saved = run.saved_config().evaluation
    requested = (evaluation.control, evaluation.siblings)
    return requested not in [(None, ()), (saved.control, saved.siblings)]


def log_where(trained: TrainedRun) -> None:
    """Log where the results of a run can be looked at."""
    folder = trained.run.folder
    if folder.exists(layout.REPORT):
        log(f"report: {folder}/{layout.REPORT}")
    log(f"figures: {folder}/{layout.FIGURES}")
    log(f"compare runs: {how_to_open(trained.tracking_uri)}")


@contextmanager
def begun_training(config: Config, data_hash: str | None = None) -> Iterator[Training]:
    """Check what can be checked before workers start, and start the run or find it again.

    Within the block no other job can train the run. ``data_hash``: of the slices that the store
    must have, if given.

    Raises:
        BrainrayError: settings or data with which training cannot start, or the run is in use by
            another job.
    """
    config, store = store_to_train_on(config, data_hash)
    with held(Folder(config.storage), layout.RUNS, config.given("name")):
        existing, workers = run_to_resume(config), None
        if existing is None or not existing.is_complete:
            workers = check_training(config, store, has_epochs=_has_epochs(existing))
        num_workers = 0 if workers is None else workers.num_workers
        if existing is not None:
            check_run_fits(existing, store, num_workers)
        run = existing or begin_run(config, store, num_workers)
        _log_start(run, existing is not None, config, store)
        if workers is not None:
            run.write_config(config)  # what may change when it resumes
            record_submission(config, run, workers)
        yield Training(config, store, run, workers)


def check_training(
    config: Config, store: ImageStore, *, has_epochs: bool = False
) -> WorkerResources:
    """The workers that will train on a store; after an epoch, starting weights are not needed.

    Raises:
        BrainrayError: settings that do not fit the store or the Ray cluster.
    """
    check_compared_runs(config, store.manifest.data_hash)
    workers = plan_workers(config.train, alive_nodes())
    if not has_epochs:
        check_weights(config, store)
    return workers


def check_weights(config: Config, store: ImageStore) -> None:
    """Raises ConfigError if the encoder cannot start from the given weights: within a second,
    rather than on every worker after half a minute.
    """
    if config.encoder.weights not in WEIGHTS_OF_NO_SLICE:
        where = f"encoder.weights={config.encoder.weights}"
        state = starting_weights(config).state
        build_encoder(config.encoder.name, state, len(store.manifest.classes), where)


def _has_epochs(run: Run | None) -> bool:
    """Whether a run has a checkpoint of its own."""
    return run is not None and bool(run.folder.read_json_lines(layout.METRICS))


def fit(training: Training, callbacks: Sequence[Any] = ()) -> None:
    """Train with DDP until the last epoch, from the newest checkpoint if there is one.

    A requested warm-up is trained before the first epoch, unless it exists already.
    ``callbacks`` are Ray Train's ``UserCallback``s.

    Raises:
        BrainrayError: an error in a worker that a user can act on, such as a collapse.
        ray.train.TrainingFailedError: workers were lost more often than ``train.max_failures``.
    """
    config, run, workers = training.config, training.run, training.workers
    assert workers is not None, "a complete run is not trained"
    # Starting weights are not needed once an epoch has left a checkpoint.
    start = "random" if _has_epochs(run) else warm_up(config, training.store)
    settings = {
        "config": config.without_secrets().model_dump(mode="json"),
        "run": str(run.folder),
        "store": str(training.store.folder),
        "start": ray.put(start),
    }
    with RoomFollower(workers):
        train_on_workers(
            train_worker,
            settings,
            folder=run.folder,
            workers=workers,
            config=config.train,
            callbacks=callbacks,
        )


def complete_run(training: Training) -> None:
    """Write figures, report and the summary, which comes last and marks the run as complete."""
    config, run = training.config, training.run
    metrics = _summarise(config, run)
    shift = run.folder.read_json_lines(layout.METRICS)[-1].get("train/class_shift", 0.0)
    if config.objective.learns_pseudo_labels and shift > _MAX_CLASS_SHIFT:
        log(
            f"note: the encoder assigns {shift:.0%} of the unlabelled slices to other classes than "
            "their pseudo-labels, which follow the class mix of the labelled slices: label slices "
            "drawn at random, or compare with objective.name=supervised"
        )
    write_results(config, run, metrics, training.store)


def _summarise(config: Config, run: Run) -> Metrics:
    """Metrics of the chosen epoch, and under ``last/`` those of the last epoch."""
    history = run.folder.read_json_lines(layout.METRICS)
    # The kept best epoch: a run that was started with another rule may have chosen another.
    chosen, last = load_checkpoint(run.folder / layout.BEST).epoch, len(history)
    metrics: Metrics = {"chosen_epoch": float(chosen), "num_epochs": float(last)}
    metrics_by_epoch = {
        epoch: _summarise_epoch(config, run, epoch, history) for epoch in {chosen, last}
    }
    metrics |= metrics_by_epoch[chosen]
    metrics |= {f"last/{name}": value for name, value in metrics_by_epoch[last].items()}
    metrics |= {f"time/{key}": value for key, value in _mean_times(history).items()}
    return metrics


def _summarise_epoch(config: Config, run: Run, epoch: int, history: History) -> Metrics:
    """Test metrics of an epoch if its predictions are kept, and the logged ones of its model."""
    logged = history[epoch - 1]
    metrics: Metrics = {}
    if run.folder.exists(layout.predictions_file(epoch)):
        metrics = summarise(
            run.folder.read_table(layout.predictions_file(epoch)),
            run.folder.read_table(layout.SEEN),
            run.record.classes,
            num_resamples=config.evaluation.bootstrap_resamples,
            seed=config.seed,
            groups=groups_of_test_slices(run.folder),
            temperature=logged["validation/temperature"],
        )
    return metrics | {
        name: value
        for name, value in logged.items()
        if name.startswith(("validation/", "cluster/", "train/loss/"))
    }


def _mean_times(history: History) -> dict[str, float]:
    """By stage, over the epochs that have it: one that was interrupted may lack some."""
    names = [name for name in history[-1] if name.startswith("time/")]
    return {
        name.removeprefix("time/"): statistics.mean(
            epoch[name] for epoch in history if name in epoch
        )
        for name in names
    }


def _log_start(run: Run, resumed: bool, config: Config, store: ImageStore) -> None:
    if run.is_complete:
        log(f"run {run.folder}: complete, nothing to train")
    elif resumed:
        num_done = len(run.folder.read_json_lines(layout.METRICS))
        where = (
            f"resuming after epoch {num_done}" if num_done else "resuming before its first epoch"
        )
        log(f"run {run.folder}: {where}")
    else:
        num_slices, split = run.record.num_slices, config.split
        counts = ", ".join(f"{count} {role}" for role, count in num_slices.items())
        log(f"run {run.folder}: new, training slices: {counts}")
        read = num_slices[LABELLED] + num_slices[VALIDATION]
        if split.labelled_fraction < 1:
            num_labels = sum(
                count for name, count in store.manifest.num_slices[TRAIN].items() if name
            )
            log(
                f"the run reads {read} of {num_labels} labels "
                f"(split.labelled_fraction={split.labelled_fraction:g}; 1 reads all)"
            )
        if store.manifest.is_compared_otherwise:
            log(
                "note: another version of brainray estimated the store's subjects: test slices may "
                "be strict by its leakage report and not by the run's; for one estimate preprocess "
                "again under another name"
            )
        if num_slices[VALIDATION] > _FAR_MORE * split.validation_fraction * read:
            log(
                f"note: {num_slices[VALIDATION]} of these {read} slices are used for validation, "
                f"more than split.validation_fraction={split.validation_fraction:g}: every class "
                "needs one, and copies and subjects given by metadata stay together"
            )
        uses_unlabelled = build_objective(config.objective).uses_unlabelled
        if UNLABELLED_ROLE not in num_slices and uses_unlabelled:
            log(
                "note: no unlabelled slices: the terms of "
                f"objective.name={config.objective.name} that are for them are 0"
            )
        weights = config.encoder.weights
        if weights not in WEIGHTS_OF_NO_SLICE and not run.folder.exists(layout.SEEN_BEFORE):
            log(
                f"note: no record of what {weights} was trained on: clean and strict refer to the "
                "slices of this run only"
            )
