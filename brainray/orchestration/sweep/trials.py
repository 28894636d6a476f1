"""Trials of a sweep: their configuration, run, and state in storage."""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from brainray import layout
from brainray.config import TRAINING_SECTIONS, WORKER_KEYS, Config, SearchDomain, TrainConfig
from brainray.config_text import did_you_mean, flatten, known_keys, parse_config
from brainray.engine.selection import chosen_epoch, reported_metrics
from brainray.errors import BrainrayError, ConfigError, StoreChangedError, TransientError
from brainray.orchestration.run import Run
from brainray.orchestration.training.driver import begun_training, complete_run, fit
from brainray.schema import History
from brainray.storage import Folder

FAILED = "failed"
"""Folder of a sweep with a file for each trial that could not be trained."""

_SEARCHED = [name for name in TRAINING_SECTIONS if name not in {"split", "evaluation", "tracking"}]
"""Sections in which trials may differ."""

_WARM_UP_SETTINGS = (
    "encoder.",
    "self_supervision.",
    "train.weight_decay",
    "train.warmup_fraction",
    "train.precision",
)
"""Settings that a warm-up depends on: all trials share one warm-up."""

_RESOURCE_SETTINGS = (*WORKER_KEYS, "train.cache_gib")

_TRIAL_ID = r"([0-9a-f]{5}_[0-9]{5,}|[0-9a-f]{8})"
"""Ray Tune's ids of variants that it generates itself, and of those from a search algorithm."""


class Score(NamedTuple):
    """A trial's metric at its chosen epoch."""

    value: float
    epoch: int


@dataclass(frozen=True)
class Trial:
    """A trial as recorded in its run's folder."""

    trial_id: str
    run: Run | None  # None for a trial that failed before its run began
    parameters: dict[str, Any]
    history: History
    train: TrainConfig  # with the trial's own parameters
    problem: str | None = None
    """Why it could not be trained."""

    @property
    def is_complete(self) -> bool:
        """Whether its run has been trained to its end and summarised."""
        return self.run is not None and self.run.is_complete

    def chosen(self, metric: str) -> Score | None:
        """The metric at the epoch whose model the run keeps; None before the first epoch."""
        if not self.history:
            return None
        epoch = self.history[chosen_epoch(self.history) - 1]
        return Score(epoch[metric], int(epoch["epoch"])) if metric in epoch else None


def run_trial(
    parameters: dict[str, Any], *, base: dict[str, Any], data_hash: str, command: list[str]
) -> None:
    """Train or resume one trial, in an actor of Ray Tune.

    Args:
        parameters: the trial's, by dotted key.
        base: the sweep's config.
        data_hash: of the sweep's image store.
        command: the command line that started the sweep.

    Errors caused by a trial's settings are saved in the sweep's folder instead of raised, because
    Tune would retry the trial. Other errors are raised, so that it is retried.
    """
    config = parse_config(base)
    sys.argv = command  # for the run's records; the process's own command line is Ray's
    trial_id = tune.get_context().get_trial_id()
    failed, failure = sweep_folder(config) / FAILED, f"{trial_id}.json"
    failed.delete_file(failure, missing_ok=True)  # of an attempt that Tune has not recorded
    try:
        config_of_trial = trial_config(config, parameters, run_name(config, trial_id))
        with begun_training(config_of_trial, data_hash) as training:
            if training.run.is_complete:  # the trial was interrupted after its last epoch
                history = training.run.folder.read_json_lines(layout.METRICS)
                tune.report(reported_metrics(history))
                return
            fit(training, callbacks=[TuneReportCallback()])
            complete_run(training)
    except (StoreChangedError, TransientError):
        raise
    except BrainrayError as error:
        failed.write_json(failure, {"parameters": parameters, "problem": str(error)})
        # Tune needs a value for every trial: report the worst possible one.
        worst = -math.inf if config.tune.mode == "max" else math.inf
        tune.report({"epoch": config.train.num_epochs, config.tune.metric: worst})


def trial_config(base: Config, parameters: Mapping[str, Any], name: str) -> Config:
    """The base config with a trial's parameters (by dotted key) and name.

    A policy defines its own strengths, so those of the base's policy are removed.

    Raises:
        ConfigError: a value that is invalid for its key.
    """
    tree = base.model_dump(mode="json")
    for key, value in parameters.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        if leaf == "policy":
            prefix = key.removesuffix(leaf)
            kept = {part: node[part] for part in node if f"{prefix}{part}" in parameters}
            node.clear()
            node.update(kept)
        node[leaf] = value
    return parse_config(tree | {"name": name})


def check_space(config: Config) -> None:
    """Reject a search space that is invalid or whose trials would not be comparable.

    Raises:
        ConfigError: it is empty, or a key or range is invalid; several label draws are requested.
    """
    if config.evaluation.num_label_draws > 1:
        raise ConfigError(
            "evaluation.num_label_draws: trials share one label draw; train the best settings on "
            "several draws with jobs/train.py"
        )
    space = config.tune.space
    if not space:
        raise ConfigError(
            "tune.space is empty: name at least one key, such as "
            "train.learning_rate: {log_uniform: [1e-4, 1e-2]}"
        )
    for key, entry in space.items():
        if key not in known_keys():
            hint = did_you_mean(key.split("."))
            raise ConfigError(f"tune.space contains the unknown key {key!r}{hint}")
        if key.partition(".")[0] not in _SEARCHED:
            raise ConfigError(
                f"tune.space cannot vary {key}: trials may differ in {', '.join(_SEARCHED)} only; "
                "they share the store, the labels and the scoring, so that their metrics are "
                "comparable"
            )
        if key in _RESOURCE_SETTINGS:
            raise ConfigError(
                f"tune.space cannot vary {key}: trials share the Ray cluster in equal parts"
            )
        warms_up = config.encoder.pretext != "none"
        if key.startswith("encoder.pretext") or (warms_up and key.startswith(_WARM_UP_SETTINGS)):
            raise ConfigError(
                f"tune.space cannot vary {key}: trials share the warm-up without labels "
                "(encoder.pretext), which depends on it"
            )
        if key.startswith("self_supervision."):
            raise ConfigError(
                f"tune.space varies {key}, which has no effect without a warm-up (encoder.pretext)"
            )
        if len(entry) != 1:
            raise ConfigError(
                f"tune.space.{key} needs exactly one of choice, uniform, log_uniform and integer"
            )
        ((kind, values),) = entry.items()
        if not values:
            raise ConfigError(f"tune.space.{key}.{kind} is empty")
        if kind != "choice":
            _check_range(key, kind, values)
            if config.tune.algorithm == "grid":
                raise ConfigError(f"tune.algorithm=grid accepts choice only: tune.space.{key}")
    for _ in example_trials(config):  # each is validated
        pass


def example_trials(config: Config) -> Iterator[Config]:
    """Configs of trials that together have every choice, and the ends of every range.

    Raises:
        ConfigError: a value that is invalid for its key.
    """
    space = config.tune.space
    corners = {key: _examples(entry)[0] for key, entry in space.items()}
    name = run_name(config, "00000_00000")  # as long as Tune's
    for key, entry in space.items():
        for value in _examples(entry):
            yield trial_config(config, corners | {key: value}, name)


def _check_range(key: str, kind: str, values: list[Any]) -> None:
    numbers = all(isinstance(value, (int, float)) for value in values)
    if len(values) != 2 or not numbers or not values[0] < values[1]:
        raise ConfigError(f"tune.space.{key}.{kind} needs two increasing numbers, not {values}")
    if kind == "integer" and not all(float(value).is_integer() for value in values):
        raise ConfigError(f"tune.space.{key}.integer needs whole numbers, not {values}")
    if kind == "log_uniform" and values[0] <= 0:
        raise ConfigError(f"tune.space.{key}.log_uniform must start above 0, not at {values[0]}")


def _examples(entry: SearchDomain) -> list[Any]:
    """Representative values of a range or choice."""
    ((kind, values),) = entry.items()
    if kind in {"uniform", "log_uniform"}:
        low, high = values
        return [low, low + (high - low) / math.pi, high]  # the second is not a round number
    return values


def sweep_folder(config: Config) -> Folder:
    return Folder(config.storage) / layout.SWEEPS / config.given("name")


def run_name(config: Config, trial_id: str) -> str:
    """Name of the run of a sweep's trial."""
    return f"{config.given('name')}-{trial_id}"


def read_trials(config: Config) -> list[Trial]:
    """All trials of a sweep that have started, in the order of their ids."""
    return TrialReader(config).read()


class TrialReader:
    """Reads the trials of a sweep repeatedly; the initial settings of each run only once."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._runs = Folder(config.storage) / layout.RUNS
        self._pattern = re.compile(re.escape(run_name(config, "")) + _TRIAL_ID)
        self._trial_by_run: dict[str, Trial | None] = {}  # by run; None for one that is not a trial

    def read(self) -> list[Trial]:
        """All trials that have started, in the order of their ids."""
        trials = {}
        for name in self._runs.names():
            begun = self._begun_trial(name)
            if begun is not None:
                history = (self._runs / name).read_json_lines(layout.METRICS)
                trials[begun.trial_id] = replace(begun, history=history)
        failed = sweep_folder(self._config) / FAILED
        for name in failed.names():
            trial_id, failure = name.removesuffix(".json"), failed.read_json(name)
            begun = trials.get(trial_id)
            if begun is None:
                begun = Trial(trial_id, None, {}, [], self._config.train)
            trials[trial_id] = replace(
                begun, parameters=failure["parameters"], problem=failure["problem"]
            )
        return [trials[trial_id] for trial_id in sorted(trials)]

    def _begun_trial(self, name: str) -> Trial | None:
        """The trial of a run, without its epochs; None if the run is not a trial."""
        matched, folder = self._pattern.fullmatch(name), self._runs / name
        if matched is None or (name not in self._trial_by_run and not folder.exists(layout.RUN)):
            return None
        if name not in self._trial_by_run:
            run = Run.open(folder)
            saved = run.saved_config()
            flat = flatten(saved)
            parameters = {key: flat.get(key) for key in self._config.tune.space}
            # A run that was merely named like a trial has another MLflow experiment.
            is_trial = saved.tracking.experiment == self._config.name
            begun = Trial(matched.group(1), run, parameters, [], saved.train)
            self._trial_by_run[name] = begun if is_trial else None
        return self._trial_by_run[name]


def ranked_trials(config: Config, trials: list[Trial]) -> list[Trial]:
    """Trials with a metric, best first, without failed ones."""
    metric, mode = config.tune.metric, config.tune.mode
    sound = [trial for trial in trials if trial.problem is None]
    scored = [(best.value, trial) for trial in sound if (best := trial.chosen(metric))]
    scored.sort(key=lambda pair: pair[0], reverse=mode == "max")
    return [trial for _, trial in scored]
