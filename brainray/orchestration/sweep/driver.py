"""Sweeps: trials of the training driver under Ray Tune, resumable by name."""

from dataclasses import dataclass
from typing import Any

from ray import tune

from brainray import layout
from brainray.config import Config
from brainray.config_text import flatten, parse_config, to_yaml
from brainray.errors import BrainrayError, ConfigError
from brainray.log import log
from brainray.orchestration.lock import held
from brainray.orchestration.prediction.export import served_files
from brainray.orchestration.prediction.inference import find_predictor
from brainray.orchestration.pretraining.driver import warm_up
from brainray.orchestration.publish import open_tracking
from brainray.orchestration.records import check_same_settings
from brainray.orchestration.resources import WorkerResources
from brainray.orchestration.run import lasting_settings
from brainray.orchestration.store import ImageStore, check_sides, store_to_train_on
from brainray.orchestration.sweep.follower import NUM_SHOWN, SweepFollower, trials_table
from brainray.orchestration.sweep.trials import (
    Trial,
    check_space,
    example_trials,
    ranked_trials,
    read_trials,
    run_name,
    sweep_folder,
    trial_config,
)
from brainray.orchestration.sweep.tuner import build_tuner, errors_of
from brainray.orchestration.training.driver import check_training, check_weights
from brainray.report.sweep_figures import ScoredTrial, draw_sweep_figures
from brainray.schema import Metrics
from brainray.storage import Folder
from brainray.tracking import Tracker, status_after

_SETTINGS = "sweep.json"  # settings that must not change when it resumes
_BEST = "best.yaml"
_TRIALS = "trials.json"
_TABLE = "trials.md"


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
    name = config.given("name")
    check_space(config)
    base, store = store_to_train_on(config)
    # Each sweep has its own MLflow experiment.
    tracked = base.tracking.model_copy(update={"experiment": name})
    base = base.model_copy(update={"tracking": tracked})
    with held(Folder(base.storage), layout.SWEEPS, name):
        return _sweep(base, store)


def _sweep(base: Config, store: ImageStore) -> FinishedSweep:
    folder = sweep_folder(base)
    workers = None if folder.exists(layout.SUMMARY) else _check_trials(base, store)
    _check_or_write_settings(base, store, folder)
    if workers is None:
        log(f"sweep {folder}: complete, nothing to search")
        if base.registry.name is not None:  # of use only when a sweep concludes
            log(f"to register one: jobs/export.py --set run={base.name}-TRIAL registry.name=NAME")
        return _finished(folder, folder.read_json(layout.SUMMARY))
    tuner = build_tuner(base, store, folder, workers)
    tracker = open_tracking(
        base,
        folder,
        flatten(base.without_secrets()),
        {"brainray.data_hash": store.manifest.data_hash},
    )
    with tracker.ended_by_errors():
        return _search(base, folder, store, tuner, tracker)


def _check_trials(base: Config, store: ImageStore) -> WorkerResources:
    """The workers of each trial.

    Raises:
        BrainrayError: a trial cannot start with its settings, on the store or on the Ray cluster.
    """
    starts: dict[tuple[str, str], Config] = {}
    for trial in example_trials(base):
        check_sides(trial)
        starts[trial.encoder.name, trial.encoder.weights] = trial
    for trial in starts.values():
        check_weights(trial, store)
    return check_training(base, store)


def _search(
    base: Config, folder: Folder, store: ImageStore, tuner: tune.Tuner, tracker: Tracker
) -> FinishedSweep:
    follower = SweepFollower(base, tracker)
    tracker.running()
    try:
        warm_up(base, store)  # once, for all trials
        with follower:
            results = tuner.fit()
            follower.errors = errors_of(results)
        trials = read_trials(base)
        ranked = ranked_trials(base, trials)
        if not ranked:
            raise BrainrayError(
                f"no trial could be trained: {_reasons_for_failure(base, trials, follower.errors)}"
            )
        return _conclude(base, folder, trials, ranked, follower, tracker)
    except BaseException as stop:
        follower.end(status_after(stop))
        raise


def _reasons_for_failure(config: Config, trials: list[Trial], errors: dict[str, str]) -> str:
    problems = sorted({trial.problem for trial in trials if trial.problem})
    problems += sorted(set(errors.values()))
    if not problems and config.tune.time_budget_min is not None:
        return f"none finished an epoch within tune.time_budget_min={config.tune.time_budget_min}"
    return "; ".join(problems) or "see the log"


def _check_or_write_settings(config: Config, store: ImageStore, folder: Folder) -> None:
    """Save the sweep's settings, or check that they are unchanged.

    Raises:
        ConfigError: a sweep of that name exists with other settings or data, or has left runs.
    """

    def lasting(config: Config, data_hash: str) -> dict[str, Any]:
        searched = config.model_dump(mode="json", include={"tune"})
        return lasting_settings(config) | searched | {"data_hash": data_hash}

    settings = lasting(config, store.manifest.data_hash)
    if not folder.exists(_SETTINGS):
        left = [trial.trial_id for trial in read_trials(config)]
        if left:
            raise ConfigError(
                f"runs of a deleted sweep {folder.name!r} would be taken for trials of this one: "
                f"choose another name, or delete {Folder(config.storage) / layout.RUNS}/"
                f"{run_name(config, left[0])} and similar runs"
            )
        folder.write_json(_SETTINGS, settings)
        is_grid = config.tune.algorithm == "grid"
        log(f"sweep {folder}: new" + ("" if is_grid else f", {config.tune.num_trials} trials"))
        return
    saved = folder.read_json(_SETTINGS)
    begun_with = lasting(parse_config(saved, is_saved=True), saved.get("data_hash"))
    check_same_settings(f"sweep {config.name!r}", begun_with, settings, "choose another name")
    log(f"sweep {folder}: resumed")


def _conclude(
    config: Config,
    folder: Folder,
    trials: list[Trial],
    ranked: list[Trial],
    follower: SweepFollower,
    tracker: Tracker,
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
    table = trials_table(config, trials, follower.outcome, limit=None)
    folder.write_bytes(_TABLE, (table + "\n").encode())
    folder.write_json(_TRIALS, [_row(config, trial, follower.outcome(trial)) for trial in trials])
    draw_sweep_figures(
        folder,
        [_scored(config, trial) for trial in ranked],
        config.tune.space,
        metric=metric,
        maximise=mode == "max",
    )
    for trial in trials:
        follower.close(trial)
    lost = follower.errors.keys()  # perhaps before their runs began
    failed = {trial.trial_id for trial in trials if trial.problem} | lost
    metrics: Metrics = {
        f"best/{metric}": value,
        "best/epoch": float(epoch),
        "num_trials": float(len({trial.trial_id for trial in trials} | lost)),
        "num_failed": float(len(failed)),
    }
    tracker.log_summary(metrics)
    figures = [f"{layout.FIGURES}/{name}" for name in (folder / layout.FIGURES).names()]
    tracker.log_files([_BEST, _TABLE, _TRIALS, _SETTINGS, *figures])
    tracker.log_tags({"brainray.best_trial": best.trial_id})
    name = None if follower.errors else config.registry.name
    _log_model(config, best, tracker, name)
    tracker.finish()
    summary: dict[str, Any] = {
        "metrics": metrics,
        "table": trials_table(config, trials, follower.outcome, limit=NUM_SHOWN),
        "mlflow_run_id": tracker.mlflow_run_id,
        "tracking_uri": tracker.uri,
    }
    if follower.errors:
        log(f"{len(follower.errors)} trials were lost: submit the sweep again to resume them")
    elif (tracker.problem or follower.problem) is not None:
        log("MLflow did not receive everything: submit the sweep again to send it")
    else:
        folder.write_json(layout.SUMMARY, summary)
        num_cut = sum(follower.outcome(trial).startswith("stopped") for trial in trials)
        is_short = config.tune.algorithm != "grid" and len(trials) < config.tune.num_trials
        if config.tune.time_budget_min is not None and (is_short or num_cut):
            log(
                f"{len(trials)} trials, {num_cut} of them stopped by the scheduler or because "
                "tune.time_budget_min was used up"
            )
    return _finished(folder, summary)


def _finished(folder: Folder, summary: dict[str, Any]) -> FinishedSweep:
    names = ("metrics", "table", "mlflow_run_id", "tracking_uri")
    return FinishedSweep(folder, **{name: summary[name] for name in names})


def _log_model(config: Config, best: Trial, tracker: Tracker, name: str | None) -> None:
    """Log the best model to the sweep's MLflow run, and register it if a name is given."""
    if best.run is None:
        return
    best_config = config.model_copy(update={"run": best.run.record.name, "epoch": None})
    with served_files(find_predictor(best_config)) as served:
        tracker.log_model(served, name, force=False)


def _scored(config: Config, trial: Trial) -> ScoredTrial:
    best = trial.chosen(config.tune.metric)
    assert best is not None, "a trial without a metric is not ranked"
    curve = [epoch[config.tune.metric] for epoch in trial.history]
    return ScoredTrial(trial.trial_id, trial.parameters, best.value, curve)


def _row(config: Config, trial: Trial, outcome: str) -> dict[str, Any]:
    best = trial.chosen(config.tune.metric)
    return {
        "trial_id": trial.trial_id,
        "parameters": trial.parameters,
        "run": None if trial.run is None else str(trial.run.folder),
        "outcome": outcome,
        "num_epochs": len(trial.history),
        "best": None if best is None else {"value": best.value, "epoch": best.epoch},
        "seconds": sum(epoch["time/epoch_s"] for epoch in trial.history),
    }
