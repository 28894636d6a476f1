"""Sweeps: trials of the training driver under Ray Tune, resumable by name."""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import (
    BasicVariantGenerator,
    ConcurrencyLimiter,
    SearchAlgorithm,
    Searcher,
)
from ray.tune.search.optuna import OptunaSearch

from brainray import layout
from brainray.config import Config
from brainray.config_text import flatten, to_yaml
from brainray.engine.evaluate import Metrics
from brainray.errors import BrainrayError, ConfigError, DataError, StorageError, TrackingError
from brainray.log import log
from brainray.orchestration.lock import held, is_held
from brainray.orchestration.prediction.export import served_files
from brainray.orchestration.prediction.inference import find_predictor
from brainray.orchestration.pretraining.driver import warm_up
from brainray.orchestration.progress import POLL_S, Watcher, time_left
from brainray.orchestration.publish import Tracking, begin_tracking, open_tracking, send_run
from brainray.orchestration.resources import WorkerResources
from brainray.orchestration.store import ImageStore, differing_settings, with_defaults
from brainray.orchestration.sweep.trials import (
    Trial,
    TrialReader,
    check_space,
    read_trials,
    run_name,
    run_trial,
    sweep_folder,
    trial_config,
)
from brainray.orchestration.training.driver import check_training
from brainray.redaction import redacted
from brainray.report.sweep_figures import TrialOutcome, draw_sweep_figures
from brainray.report.table import markdown_table
from brainray.storage import Folder
from brainray.tracking import PARENT_TAG, LenientTracker

_TUNE = "tune"  # Tune's own state, inside the sweep's folder
_SETTINGS = "sweep.json"  # settings that must not change when it resumes
_BEST = "best.yaml"
_TRIALS = "trials.json"
_TABLE = "trials.md"
_TABLE_EVERY_S = 60.0
_NUM_SHOWN = 10
_RUNNING = "running"


@dataclass(frozen=True)
class FinishedSweep:
    """Results of a sweep."""

    folder: Folder
    metrics: Metrics
    table: str
    mlflow_run_id: str | None
    tracking_uri: str


def sweep(config: Config) -> FinishedSweep:
    """Search ``tune.space`` for the best validation metric, or resume a search.

    All trials train on the store ``config.dataset``, each as a run named ``NAME-TRIAL``. With the
    same name, the sweep resumes: finished trials are not repeated, interrupted ones continue from
    their last checkpoint, and ``tune.num_trials`` counts them all.

    Raises:
        BrainrayError: no trial can start with these settings, or no trial could be trained.
    """
    if config.name is None:
        raise ConfigError("a sweep needs a name: --set name=NAME")
    if config.evaluation.num_label_draws > 1:
        raise ConfigError(
            "evaluation.num_label_draws: trials share one label draw; train the best settings on "
            "several draws with jobs/train.py"
        )
    check_space(config)
    base, store, workers = check_training(config)
    # Each sweep has its own MLflow experiment.
    tracked = base.tracking.model_copy(update={"experiment": config.name})
    base = base.model_copy(update={"tracking": tracked})
    with held(Folder(base.storage), layout.SWEEPS, config.name):
        return _sweep(base, config.name, store, workers)


def _sweep(base: Config, name: str, store: ImageStore, workers: WorkerResources) -> FinishedSweep:
    folder = sweep_folder(base, name)
    _begin(base, store, folder)
    open_parent = partial(
        open_tracking,
        base,
        folder,
        flatten(base.without_secrets()),
        {"brainray.data_hash": store.data_hash},
    )
    if folder.exists(layout.SUMMARY):
        log(f"sweep {folder}: complete, nothing to search")
        summary = folder.read_json(layout.SUMMARY)
        registered = summary.pop("registered", None)
        if base.registry.name not in {None, registered}:
            _register_later(base, name, open_parent())
            folder.write_json(layout.SUMMARY, summary | {"registered": base.registry.name})
            log(f"registered its best model as {base.registry.name}")
        return FinishedSweep(folder=folder, **summary)
    tracking = open_parent()
    tracking.tracker.running()
    follower = _Follower(base, name, tracking)
    try:
        warm_up(base, store)  # once, for all trials
        with follower:
            results = _tuner(base, folder, workers).fit()
            follower.errors = _errors(results)
        trials = read_trials(base, name)
        ranked = _ranked(base, trials)
        if not ranked:
            raise BrainrayError(
                f"no trial could be trained: {_why_none(base, trials, follower.errors)}"
            )
        return _conclude(base, folder, trials, ranked, follower, tracking)
    except BaseException as stop:
        status = "FAILED" if isinstance(stop, Exception) else "KILLED"
        follower.end(status)
        tracking.tracker.finish(status)
        raise


def _why_none(config: Config, trials: list[Trial], errors: dict[str, str]) -> str:
    problems = sorted({trial.problem for trial in trials if trial.problem})
    problems += sorted(set(errors.values()))
    if not problems and config.tune.time_budget_min is not None:
        return f"none finished an epoch within tune.time_budget_min={config.tune.time_budget_min}"
    return "; ".join(problems) or "see the log"


def _begin(config: Config, store: ImageStore, folder: Folder) -> None:
    """Save the sweep's settings, or check that they are unchanged.

    Raises:
        ConfigError: a sweep of that name exists with other settings or data, or has left runs.
    """
    settings = config.model_dump(mode="json", exclude={"storage", "tracking", "registry", "study"})
    settings["data_hash"] = store.data_hash
    del settings["preprocess"]  # part of the store, covered by its hash
    if config.encoder.pretext == "none":
        del settings["self_supervision"]
    if not folder.exists(_SETTINGS):
        left = [trial.trial_id for trial in read_trials(config, folder.name)]
        if left:
            raise ConfigError(
                f"runs of a deleted sweep {folder.name!r} would be taken for trials of this one: "
                f"choose another name, or delete {Folder(config.storage) / layout.RUNS}/"
                f"{run_name(folder.name, left[0])} and similar runs"
            )
        folder.write_json(_SETTINGS, settings)
        of_grid = config.tune.algorithm == "grid"
        log(f"sweep {folder}: new" + ("" if of_grid else f", {config.tune.num_trials} trials"))
        return
    begun_with = folder.read_json(_SETTINGS)
    # Settings that an earlier version did not have are taken to be at their defaults.
    defaults = Config().model_dump(mode="json")
    begun_with = with_defaults(begun_with, {key: defaults.get(key) for key in settings})
    difference = differing_settings(begun_with, settings)
    if difference:
        raise ConfigError(
            f"sweep {config.name!r} exists with other settings ({difference}): choose another name"
        )
    log(f"sweep {folder}: resumed")


def _tuner(config: Config, folder: Folder, workers: WorkerResources) -> tune.Tuner:
    trainable = tune.with_resources(
        tune.with_parameters(
            run_trial,
            base=config.without_secrets().model_dump(mode="json"),
            sweep=config.name,
            command=[redacted(part) for part in sys.argv],  # saved by Ray and in storage
        ),
        # Trials only wait for their workers: they need no CPU, and run on the driver's node.
        {"node:__internal_head__": 0.001},
    )
    # A stopped trial is blocked in Ray Train: force it to end, or its workers would stay.
    os.environ.setdefault("TUNE_FORCE_TRIAL_CLEANUP_S", "10")
    os.environ.setdefault("AIR_VERBOSITY", "0")  # not remembered by a restored Tuner
    # Tune's own handler would make an interrupted sweep look complete.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    path = str(folder / _TUNE)
    if _has_state(config, folder / _TUNE):
        space = _param_space(config)
        try:
            return tune.Tuner.restore(path, trainable, resume_errored=True, param_space=space)
        except (AttributeError, ImportError) as error:  # from unpickling
            raise ConfigError(
                f"{path} was written by another version of brainray or Ray ({error}): resume the "
                "sweep with that version, or choose another name"
            ) from None
    settings = config.tune
    concurrent = settings.max_concurrent_trials or max(1, workers.room // workers.num_workers)
    log(f"{concurrent} trial(s) at a time, {workers.num_workers} worker(s) each")
    budget = settings.time_budget_min
    return tune.Tuner(
        trainable,
        param_space=_param_space(config),
        tune_config=tune.TuneConfig(
            metric=settings.metric,
            mode=settings.mode,
            num_samples=1 if settings.algorithm == "grid" else settings.num_trials,
            search_alg=_search(config, concurrent),
            scheduler=_scheduler(config),
            time_budget_s=None if budget is None else 60 * budget,
        ),
        run_config=tune.RunConfig(
            name=_TUNE,
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=config.train.max_failures),
            verbose=0,
        ),
    )


def _has_state(config: Config, folder: Folder) -> bool:
    """Whether Tune has saved a state to resume from, ignoring partially written files.

    Raises:
        ConfigError: there is none, but trials exist that Tune would not know about.
    """
    num_whole = 0
    for name in folder.names():
        if not name.startswith("experiment_state-"):
            continue
        try:
            folder.read_json(name)
            num_whole += 1
        except StorageError:  # does not mean that the file is damaged
            raise
        except DataError as damage:
            log(f"{damage}: partially written, ignoring it")
            folder.delete_file(name)
    if num_whole and folder.exists("tuner.pkl"):
        return True
    if not folder.names():
        return False
    begun = read_trials(config, str(config.name))
    if begun:
        raise ConfigError(
            f"{folder} has lost Tune's state, which records the sampled trials: choose another "
            f"name for the sweep, or delete {folder.parent} and its {len(begun)} runs, such as "
            f"{run_name(str(config.name), begun[0].trial_id)}"
        )
    folder.delete()
    return False


def _param_space(config: Config) -> dict[str, Any]:
    grid = config.tune.algorithm == "grid"
    domains: dict[str, Callable[[list[Any]], Any]] = {
        "choice": tune.grid_search if grid else tune.choice,
        "uniform": lambda ends: tune.uniform(*ends),
        "log_uniform": lambda ends: tune.loguniform(*ends),
        "integer": lambda ends: tune.randint(ends[0], ends[1] + 1),
    }
    return {
        key: domains[kind](values)
        for key, entry in config.tune.space.items()
        for kind, values in entry.items()
    }


def _search(config: Config, concurrent: int) -> Searcher | SearchAlgorithm:
    """Search algorithm with ``concurrent`` trials at a time, seeded with ``seed``."""
    if config.tune.algorithm == "optuna":
        settings = config.tune
        optuna = OptunaSearch(metric=settings.metric, mode=settings.mode, seed=config.seed % 2**32)
        return ConcurrencyLimiter(optuna, max_concurrent=concurrent)
    return BasicVariantGenerator(max_concurrent=concurrent, random_state=config.seed % 2**32)


def _scheduler(config: Config) -> TrialScheduler | None:
    settings = config.tune
    if settings.scheduler == "asha":
        return _Halving(
            config.train.num_epochs,
            max_t=config.train.num_epochs,
            time_attr="epoch",
            grace_period=min(settings.min_epochs, config.train.num_epochs),
            reduction_factor=settings.reduction_factor,
        )
    if settings.scheduler == "median":
        return _MedianStopping(
            config.train.num_epochs, time_attr="epoch", grace_period=settings.min_epochs
        )
    return None


class _FairToTrials(TrialScheduler):
    """Scheduler mixin: a trial that reached its last epoch is not stopped before it has made its
    figures, and one that could not be trained contributes no value.
    """

    def __init__(self, num_epochs: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._num_epochs = num_epochs

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if not math.isfinite(result.get(self.metric, math.nan)):
            return self.CONTINUE
        action: str = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result["epoch"] >= self._num_epochs else action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if math.isfinite(result.get(self.metric, math.nan)):
            super().on_trial_complete(tune_controller, trial, result)


class _Halving(_FairToTrials, AsyncHyperBandScheduler):
    pass


class _MedianStopping(_FairToTrials, MedianStoppingRule):
    pass


def _errors(results: tune.ResultGrid) -> dict[str, str]:
    """The last line of the error of each trial that Tune gave up on."""
    return {
        str(result.metrics["trial_id"]): str(result.error).strip().splitlines()[-1]
        for result in (results[number] for number in range(len(results)))
        if result.error is not None and result.metrics and "trial_id" in result.metrics
    }


def _ranked(config: Config, trials: list[Trial]) -> list[Trial]:
    """Trials with a metric, best first, without failed ones."""
    metric, mode = config.tune.metric, config.tune.mode
    sound = [trial for trial in trials if trial.problem is None]
    scored = [(best[0], trial) for trial in sound if (best := trial.chosen(metric))]
    scored.sort(key=lambda pair: pair[0], reverse=mode == "max")
    return [trial for _, trial in scored]


class _Follower(Watcher):
    """Follows the trials' folders: a line per epoch, a table per minute, and MLflow.

    The only writer to MLflow: trials only write files.
    """

    def __init__(self, config: Config, name: str, parent: Tracking) -> None:
        super().__init__()
        self._config = config
        self._name = name
        self._parent = parent
        self._quiet_s = 0.0
        self._children: dict[str, Tracking] = {}
        self._tried: set[str] = set()  # complete trials that it has tried to send
        self._sent: set[str] = set()
        self._reader = TrialReader(config, name)
        self._num_seen = {trial.trial_id: len(trial.history) for trial in self._reader.read()}
        self.errors: dict[str, str] = {}

    def outcome(self, trial: Trial) -> str:
        """How the trial ended, in a few words."""
        num_epochs = len(trial.history)
        problem = trial.problem or self.errors.get(trial.trial_id)
        if problem:
            return f"failed: {problem}"
        if trial.run is not None and trial.run.is_complete:
            return "complete"
        if num_epochs < trial.train.num_epochs:
            return f"stopped after epoch {num_epochs}"
        return "complete except for its figures"

    def state(self, trial: Trial) -> str:
        """The same for a trial that may be running."""
        has_ended = trial.run is None or trial.problem is not None or trial.run.is_complete
        name = run_name(self._name, trial.trial_id)
        if has_ended or not is_held(Folder(self._config.storage), layout.RUNS, name):
            return self.outcome(trial)
        if not trial.history:
            return _RUNNING
        return f"{_RUNNING}, {time_left(trial.history[-1], trial.train)} left"

    def close(self, trial: Trial) -> None:
        """Send the rest of a trial to MLflow, with its outcome."""
        child = self._child(trial)
        if child is None or trial.run is None or trial.trial_id in self._sent:
            return
        outcome = self.outcome(trial)
        send_run(trial.run, child.tracker)
        child.tracker.log_tags({"brainray.outcome": outcome})
        if not trial.run.is_complete:
            child.tracker.finish("FAILED" if outcome.startswith("failed") else "KILLED")
        if child.tracker.problem is None:
            self._sent.add(trial.trial_id)

    def end(self, status: str) -> None:
        """Mark trials that were started here as ended in MLflow."""
        for trial in read_trials(self._config, self._name):
            child = self._children.get(trial.trial_id)
            if child is not None:
                is_complete = trial.run is not None and trial.run.is_complete
                child.tracker.finish("FINISHED" if is_complete else status)

    @property
    def problem(self) -> str | None:
        """A problem with sending a trial to MLflow; None if all were sent."""
        problems = (child.tracker.problem for child in self._children.values())
        return next((problem for problem in problems if problem is not None), None)

    def look(self) -> None:
        self._quiet_s += POLL_S
        trials = self._reader.read()
        news = [self._tell(trial) for trial in trials]
        for trial in trials:
            is_complete = trial.run is not None and trial.run.is_complete
            # At the end, everything that is left is sent anyway.
            if is_complete and trial.trial_id not in self._tried and not self._stopped.is_set():
                self._tried.add(trial.trial_id)
                self.close(trial)
        if any(news) and self._quiet_s >= _TABLE_EVERY_S:
            log(_table(self._config, trials, self.state, limit=_NUM_SHOWN))
            self._quiet_s = 0.0

    def _tell(self, trial: Trial) -> bool:
        """Log a line for each new epoch; returns whether there was one."""
        seen = self._num_seen.get(trial.trial_id, 0)
        for epoch in trial.history[seen:]:
            log(self._line(trial, epoch))
        self._num_seen[trial.trial_id] = len(trial.history)
        if len(trial.history) == seen:
            return False
        child = self._child(trial)
        if child is not None:
            child.tracker.running()
            child.tracker.log_epochs(trial.history)
        return True

    def _line(self, trial: Trial, metrics: Metrics) -> str:
        metric = self._config.tune.metric
        values = ", ".join(f"{key} {_short(value)}" for key, value in trial.parameters.items())
        return (
            f"trial {trial.trial_id} ({values}): "
            f"epoch {metrics['epoch']:.0f}/{trial.train.num_epochs}, "
            f"{metric} {metrics.get(metric, float('nan')):.4f}, "
            f"{metrics['time/images_per_s']:.0f} images/s, "
            f"{time_left(metrics, trial.train)} left"
        )

    def _child(self, trial: Trial) -> Tracking | None:
        """The trial's MLflow run, a child of the sweep's."""
        if trial.run is None:
            return None
        if trial.trial_id not in self._children:
            config = trial_config(
                self._config, trial.parameters, run_name(self._name, trial.trial_id)
            )
            tags = {"brainray.trial_id": trial.trial_id, "brainray.sweep": self._name}
            if self._parent.mlflow_run_id is not None:
                tags[PARENT_TAG] = self._parent.mlflow_run_id
            self._children[trial.trial_id] = begin_tracking(config, trial.run, tags)
        return self._children[trial.trial_id]


def _conclude(
    config: Config,
    folder: Folder,
    trials: list[Trial],
    ranked: list[Trial],
    follower: _Follower,
    tracking: Tracking,
) -> FinishedSweep:
    """Write best config, table and figures to the sweep's folder and to MLflow."""
    metric, mode = config.tune.metric, config.tune.mode
    best = ranked[0]
    scored = best.chosen(metric)
    assert scored is not None
    value, epoch = scored
    best_config = trial_config(config, best.parameters, f"{config.name}-best")
    header = (
        f"# The best of {len(trials)} trials ({best.trial_id}: {metric} {value:.4f} at epoch "
        f"{epoch}):\n#   python jobs/train.py --config THIS_FILE\n"
    )
    folder.write_bytes(_BEST, (header + to_yaml(best_config)).encode())
    table = _table(config, trials, follower.outcome, limit=None)
    folder.write_bytes(_TABLE, (table + "\n").encode())
    folder.write_json(_TRIALS, [_row(config, trial, follower.outcome(trial)) for trial in trials])
    draw_sweep_figures(
        folder,
        [_outcome(config, trial) for trial in ranked],
        config.tune.space,
        metric=metric,
        maximise=mode == "max",
    )
    for trial in trials:
        follower.close(trial)
    metrics: Metrics = {
        f"best/{metric}": value,
        "best/epoch": float(epoch),
        "num_trials": float(len(trials)),
        "num_failed": float(sum(trial.problem is not None for trial in trials)),
    }
    tracking.tracker.log_summary(metrics)
    figures = [f"{layout.FIGURES}/{name}" for name in (folder / layout.FIGURES).names()]
    tracking.tracker.log_files([_BEST, _TABLE, _TRIALS, _SETTINGS, *figures])
    tracking.tracker.log_tags({"brainray.best_trial": best.trial_id})
    is_whole = not follower.errors
    name = config.registry.name if is_whole else None
    _log_model(config, best, tracking.tracker, name, force=False)
    tracking.tracker.finish()
    result: dict[str, Any] = {
        "metrics": metrics,
        "table": _table(config, trials, follower.outcome, limit=_NUM_SHOWN),
        "mlflow_run_id": tracking.mlflow_run_id,
        "tracking_uri": tracking.uri,
    }
    if follower.errors:
        log(f"{len(follower.errors)} trials were lost: submit the sweep again to resume them")
    elif (tracking.tracker.problem or follower.problem) is not None:
        log("MLflow did not receive everything: submit the sweep again to send it")
    else:
        folder.write_json(layout.SUMMARY, result | {"registered": config.registry.name})
        num_cut = sum(follower.outcome(trial).startswith("stopped") for trial in trials)
        is_short = config.tune.algorithm != "grid" and len(trials) < config.tune.num_trials
        if config.tune.time_budget_min is not None and (is_short or num_cut):
            log(
                f"{len(trials)} trials, {num_cut} of them stopped by the scheduler or because "
                "tune.time_budget_min was used up"
            )
    return FinishedSweep(folder=folder, **result)


def _log_model(
    config: Config, best: Trial, tracker: LenientTracker, name: str | None, *, force: bool
) -> None:
    """Log the best model to the sweep's MLflow run, and register it if a name is given."""
    if best.run is None:
        return
    of_best = config.model_copy(update={"run": str(best.run.info["name"]), "epoch": None})
    with served_files(find_predictor(of_best, "the sweep's model")) as served:
        tracker.log_model(served, name, force=force)


def _register_later(config: Config, sweep: str, tracking: Tracking) -> None:
    """Register the best model of a complete sweep under a name that is given now.

    Raises:
        TrackingError: the server cannot be used.
    """
    best = _ranked(config, read_trials(config, sweep))[0]
    _log_model(config, best, tracking.tracker, config.registry.name, force=True)
    tracking.tracker.finish()
    if tracking.tracker.problem is not None:
        raise TrackingError(tracking.tracker.problem)


def _outcome(config: Config, trial: Trial) -> TrialOutcome:
    best = trial.chosen(config.tune.metric)
    assert best is not None, "a trial without a metric has no outcome"
    curve = [epoch[config.tune.metric] for epoch in trial.history]
    return TrialOutcome(trial.trial_id, trial.parameters, best[0], curve)


def _row(config: Config, trial: Trial, outcome: str) -> dict[str, Any]:
    best = trial.chosen(config.tune.metric)
    return {
        "trial_id": trial.trial_id,
        "parameters": trial.parameters,
        "run": None if trial.run is None else str(trial.run.folder),
        "outcome": outcome,
        "num_epochs": len(trial.history),
        "best": None if best is None else {"value": best[0], "epoch": best[1]},
        "seconds": sum(epoch["time/epoch_s"] for epoch in trial.history),
    }


def _table(
    config: Config, trials: list[Trial], outcome: Callable[[Trial], str], limit: int | None
) -> str:
    """A Markdown table of trials, best first: the first ``limit``, plus all running ones."""
    metric = config.tune.metric
    ranked = _ranked(config, trials)
    others = [trial for trial in trials if trial not in ranked]
    rows = []
    for place, trial in enumerate([*ranked, *others]):
        best, said = trial.chosen(metric), outcome(trial)
        if limit is not None and place >= limit and not said.startswith(_RUNNING):
            continue
        rows.append(
            [
                trial.trial_id,
                said,
                *(_short(trial.parameters.get(key)) for key in config.tune.space),
                "–" if best is None else f"{best[0]:.4f}",
                "–" if best is None else f"{best[1]}/{len(trial.history)}",
                f"{trial.history[-1]['time/images_per_s']:.0f}" if trial.history else "–",
            ]
        )
    header = ["trial", "outcome", *config.tune.space, metric, "chosen epoch", "images/s"]
    return markdown_table(header, rows, num_text_columns=2)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
