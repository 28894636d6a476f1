"""Progress of a sweep: lines and tables about its trials, and their MLflow runs."""

import json
from collections.abc import Callable

from brainray import layout
from brainray.config import Config
from brainray.engine.selection import chosen_epoch
from brainray.log import log
from brainray.orchestration.lock import is_held
from brainray.orchestration.progress import POLL_S, Watcher, time_left
from brainray.orchestration.publish import begin_tracking, send_run
from brainray.orchestration.run import Run
from brainray.orchestration.sweep.trials import (
    Trial,
    TrialReader,
    ranked_trials,
    read_trials,
    run_name,
    trial_config,
)
from brainray.report.run_figures import draw_run_figures
from brainray.report.table import markdown_table
from brainray.schema import Metrics
from brainray.storage import Folder
from brainray.tracking import PARENT_TAG, Tracker

NUM_SHOWN = 10
"""Number of trials in a table of the log."""

_TABLE_EVERY_S = 60.0
_RUNNING = "running"


class SweepFollower(Watcher):
    """Follows the trials' folders: a line per epoch, a table per minute, and MLflow.

    The only writer to MLflow: trials only write files.
    """

    def __init__(self, config: Config, parent: Tracker) -> None:
        super().__init__()
        self._config = config
        self._parent = parent
        self._quiet_s = 0.0
        self._children: dict[str, Tracker] = {}
        self._attempted: set[str] = set()  # complete trials that it has tried to send
        self._sent: set[str] = set()
        self._stopped_trials: set[str] = set()  # by the scheduler, in this session
        self._reader = TrialReader(config)
        self._num_before = {trial.trial_id: len(trial.history) for trial in self._reader.read()}
        self._num_seen = dict(self._num_before)
        self.errors: dict[str, str] = {}

    def outcome(self, trial: Trial) -> str:
        """How the trial ended, in a few words."""
        num_epochs = len(trial.history)
        problem = trial.problem or self.errors.get(trial.trial_id)
        if problem:
            return f"failed: {problem}"
        if trial.is_complete:
            return "complete"
        if num_epochs < trial.train.num_epochs:
            return f"stopped after epoch {num_epochs}"
        return "complete except for its report"

    def state(self, trial: Trial) -> str:
        """The same for a trial that may be running."""
        if not self._is_running(trial):
            return self.outcome(trial)
        if not trial.history:
            return _RUNNING
        return f"{_RUNNING}, {time_left(trial.history[-1], trial.train)} left"

    def _is_running(self, trial: Trial) -> bool:
        if trial.run is None or trial.problem is not None or trial.run.is_complete:
            return False
        name = run_name(self._config, trial.trial_id)
        return is_held(Folder(self._config.storage), layout.RUNS, name)

    def close(self, trial: Trial) -> None:
        """Send the rest of a trial to MLflow, with its outcome."""
        child = self._child(trial)
        if child is None or trial.run is None or trial.trial_id in self._sent:
            return
        outcome = self.outcome(trial)
        if trial.history and not trial.run.is_complete:
            self._draw_curves(trial, trial.run)
        send_run(trial.run, child)
        child.log_tags({"brainray.outcome": outcome})
        if not trial.run.is_complete:
            self._finish(trial, child)
        if child.problem is None:
            self._sent.add(trial.trial_id)

    def _finish(self, trial: Trial, child: Tracker) -> None:
        """One that the scheduler or the budget stopped has ended as intended, some time ago."""
        has_failed = self.outcome(trial).startswith("failed")
        child.finish("FAILED" if has_failed else "FINISHED", with_last_metrics=True)

    def _draw_curves(self, trial: Trial, run: Run) -> None:
        """Figures of a trial that was stopped, unless they show all of its epochs already."""
        is_drawn = bool((run.folder / layout.FIGURES).names())
        if is_drawn and len(trial.history) == self._num_before.get(trial.trial_id):
            return
        try:
            draw_run_figures(run.folder, run.record.classes, chosen_epoch(trial.history), [])
        except Exception as error:  # must not stop the sweep
            log(f"trial {trial.trial_id}: no figures: {type(error).__name__}: {error}")

    def end(self, status: str) -> None:
        """Mark trials that were started here, and not stopped before, as ended in MLflow."""
        for trial in read_trials(self._config):
            child = self._children.get(trial.trial_id)
            if child is not None and trial.trial_id not in self._stopped_trials:
                child.finish("FINISHED" if trial.is_complete else status)

    @property
    def problem(self) -> str | None:
        """A problem with sending a trial to MLflow; None if all were sent."""
        problems = (child.problem for child in self._children.values())
        return next((problem for problem in problems if problem is not None), None)

    def poll(self) -> None:
        self._quiet_s += POLL_S
        trials = self._reader.read()
        has_new_epochs = [self._log_new_epochs(trial) for trial in trials]
        if not self._stopped.is_set():  # at the end, everything that is left is sent anyway
            for trial in trials:
                self._end_in_mlflow(trial)
        if any(has_new_epochs) and self._quiet_s >= _TABLE_EVERY_S:
            log(trials_table(self._config, trials, self.state, limit=NUM_SHOWN))
            self._quiet_s = 0.0

    def _end_in_mlflow(self, trial: Trial) -> None:
        """Send a trial that is complete; one that was stopped ends for now."""
        child = self._children.get(trial.trial_id)
        if trial.is_complete:
            if trial.trial_id not in self._attempted:
                self._attempted.add(trial.trial_id)
                self.close(trial)
        elif (
            child is not None
            and trial.trial_id not in self._stopped_trials
            and not self._is_running(trial)
        ):
            self._stopped_trials.add(trial.trial_id)
            self._finish(trial, child)

    def _log_new_epochs(self, trial: Trial) -> bool:
        """Log a line for each new epoch; returns whether there was one."""
        seen = self._num_seen.get(trial.trial_id, 0)
        for epoch in trial.history[seen:]:
            log(self._line(trial, epoch))
        self._num_seen[trial.trial_id] = len(trial.history)
        if len(trial.history) == seen:
            return False
        child = self._child(trial)
        self._stopped_trials.discard(trial.trial_id)
        if child is not None:
            child.running()
            child.log_epochs(trial.history)
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

    def _child(self, trial: Trial) -> Tracker | None:
        """The trial's MLflow run, a child of the sweep's."""
        if trial.run is None:
            return None
        if trial.trial_id not in self._children:
            config = trial_config(
                self._config, trial.parameters, run_name(self._config, trial.trial_id)
            )
            tags = {
                "brainray.trial_id": trial.trial_id,
                "brainray.sweep": self._config.given("name"),
            }
            if self._parent.mlflow_run_id is not None:
                tags[PARENT_TAG] = self._parent.mlflow_run_id
            self._children[trial.trial_id] = begin_tracking(config, trial.run, tags)
        return self._children[trial.trial_id]


def trials_table(
    config: Config, trials: list[Trial], outcome: Callable[[Trial], str], limit: int | None
) -> str:
    """A Markdown table of trials, best first: the first ``limit``, plus all running ones."""
    metric = config.tune.metric
    ranked = ranked_trials(config, trials)
    others = [trial for trial in trials if trial not in ranked]
    rows = []
    for place, trial in enumerate([*ranked, *others]):
        best, outcome_text = trial.chosen(metric), outcome(trial)
        if limit is not None and place >= limit and not outcome_text.startswith(_RUNNING):
            continue
        rows.append(
            [
                trial.trial_id,
                outcome_text,
                *(_short(trial.parameters.get(key)) for key in config.tune.space),
                "–" if best is None else f"{best.value:.4f}",
                "–" if best is None else f"{best.epoch}/{len(trial.history)}",
                f"{trial.history[-1]['time/images_per_s']:.0f}" if trial.history else "–",
            ]
        )
    header = ["trial", "outcome", *config.tune.space, metric, "chosen epoch", "images/s"]
    return markdown_table(header, rows, num_text_columns=2)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
