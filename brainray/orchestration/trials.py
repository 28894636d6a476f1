"""What a trial is: its configuration, its run, and what its folder tells of it."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from brainray import layout
from brainray.config import Config, SearchDomain, TrainConfig
from brainray.config_text import flatten, known_keys, parse_config
from brainray.engine.evaluate import chosen_epoch
from brainray.errors import BrainrayError, ConfigError, TransientError
from brainray.log import log
from brainray.orchestration.driver import begun_training, complete_run, fit
from brainray.orchestration.job import TRAINING_SECTIONS, WORKER_KEYS
from brainray.orchestration.run import Run, read_run_info
from brainray.orchestration.worker import reported_metrics
from brainray.storage import Folder

FAILED = "failed"
"""Folder of a sweep with a file for each trial that cannot be trained."""

_SEARCHED = [name for name in TRAINING_SECTIONS if name not in {"split", "evaluation", "tracking"}]
"""Sections in which trials may differ."""

_OF_WARM_UP = (
    "encoder.",
    "self_supervision.",
    "train.weight_decay",
    "train.warmup_fraction",
    "train.precision",
)
"""What a warm-up depends on: trials share one."""

_OF_RESOURCES = (*WORKER_KEYS, "train.cache_gib")

_TRIAL_ID = r"([0-9a-f]{5}_[0-9]{5,}|[0-9a-f]{8})"
"""As Ray Tune gives them to variants that it makes itself, and to a search algorithm's."""


@dataclass(frozen=True)
class Trial:
    """A trial as its run's folder tells of it."""

    trial_id: str
    run: Run | None  # None for a trial that failed before its run began
    parameters: dict[str, Any]
    history: list[dict[str, float]]
    train: TrainConfig  # with the trial's own parameters
    problem: str | None = None
    """Why it could not be trained."""

    def chosen(self, metric: str) -> tuple[float, int] | None:
        """(value, epoch) of the epoch whose model the run keeps; None before the first one."""
        if not self.history:
            return None
        epoch = self.history[chosen_epoch(self.history) - 1]
        return (epoch[metric], int(epoch["epoch"])) if metric in epoch else None


def run_trial(
    parameters: dict[str, Any], *, base: dict[str, Any], sweep: str, command: list[str]
) -> None:
    """Train one trial, or go on with it; in an actor of Ray Tune, which ``command`` asked for.

    What a trial's settings are to blame for is kept in the sweep's folder, not raised: Tune would
    try it again. What they are not to blame for is raised, and tried again.
    """
    config = parse_config(base)
    sys.argv = command  # of what made the run; the process's own is Ray's
    trial_id = tune.get_context().get_trial_id()
    try:
        config = trial_config(config, parameters, run_name(sweep, trial_id))
        with begun_training(config, log) as training:
            if training.run.is_complete:  # the trial was cut after its last epoch
                history = training.run.folder.read_json_lines(layout.METRICS)
                tune.report(reported_metrics(history))
                return
            fit(training, log, callbacks=[TuneReportCallback()])
            complete_run(training, log)
    except TransientError:
        raise
    except BrainrayError as error:
        folder = sweep_folder(config, sweep) / FAILED
        folder.write_json(f"{trial_id}.json", {"parameters": parameters, "problem": str(error)})
        # Tune wants a figure of every trial: one that no other is worse than.
        worst = -math.inf if config.tune.mode == "max" else math.inf
        tune.report({"epoch": config.train.num_epochs, config.tune.metric: worst})


def trial_config(base: Config, parameters: Mapping[str, Any], name: str) -> Config:
    """The base with a trial's parameters (by dotted key) and name.

    A policy brings its own strengths: those of the base's section, which are of another policy, go.

    Raises:
        ConfigError: a value that its key does not take.
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
    """Refuse a search space that cannot be searched, or whose trials would not compare.

    Raises:
        ConfigError: it is empty, or a key or range makes no sense.
    """
    space = config.tune.space
    if not space:
        raise ConfigError(
            "tune.space is empty: name at least one key, such as "
            "train.learning_rate: {log_uniform: [1e-4, 1e-2]}"
        )
    for key, entry in space.items():
        if key not in known_keys():
            raise ConfigError(f"tune.space names the unknown key {key!r}")
        if key.partition(".")[0] not in _SEARCHED:
            raise ConfigError(
                f"tune.space cannot vary {key}: trials differ in {', '.join(_SEARCHED)} alone, and "
                "share the store, the labels and the way they are scored, else their figures would "
                "not compare"
            )
        if key in _OF_RESOURCES:
            raise ConfigError(
                f"tune.space cannot vary {key}: trials share the Ray cluster, in equal parts"
            )
        warms_up = config.encoder.pretext != "none"
        if key.startswith("encoder.pretext") or (warms_up and key.startswith(_OF_WARM_UP)):
            raise ConfigError(
                f"tune.space cannot vary {key}: trials share the warm-up without labels "
                "(encoder.pretext), which depends on it"
            )
        if key.startswith("self_supervision."):
            raise ConfigError(
                f"tune.space varies {key}, which nothing reads without a warm-up (encoder.pretext)"
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
                raise ConfigError(f"tune.algorithm=grid takes choices only: tune.space.{key}")
    corners = {key: _examples(entry)[0] for key, entry in space.items()}
    name = run_name(str(config.name), "00000_00000")  # as long as Tune's
    for key, entry in space.items():
        for value in _examples(entry):
            trial_config(config, corners | {key: value}, name)


def _check_range(key: str, kind: str, values: list[Any]) -> None:
    numbers = all(isinstance(value, (int, float)) for value in values)
    if len(values) != 2 or not numbers or not values[0] < values[1]:
        raise ConfigError(f"tune.space.{key}.{kind} needs two increasing numbers, not {values}")
    if kind == "log_uniform" and values[0] <= 0:
        raise ConfigError(f"tune.space.{key}.log_uniform must begin above 0, not at {values[0]}")


def _examples(entry: SearchDomain) -> list[Any]:
    """Values that stand for all of a range or choice."""
    ((kind, values),) = entry.items()
    if kind in {"uniform", "log_uniform"}:
        low, high = values
        return [low, low + (high - low) / math.pi, high]  # the second is no round number
    return values


def sweep_folder(config: Config, name: str) -> Folder:
    return Folder(config.storage) / layout.SWEEPS / name


def run_name(sweep: str, trial_id: str) -> str:
    """Name of the run of a trial."""
    return f"{sweep}-{trial_id}"


def read_trials(config: Config, sweep: str) -> list[Trial]:
    """Every trial of a sweep that has begun, in the order of their ids."""
    return TrialReader(config, sweep).read()


class TrialReader:
    """Reads the trials of a sweep again and again; what a run began with, once."""

    def __init__(self, config: Config, sweep: str) -> None:
        self._config = config
        self._sweep = sweep
        self._runs = Folder(config.storage) / layout.RUNS
        self._pattern = re.compile(re.escape(run_name(sweep, "")) + _TRIAL_ID)
        self._begun: dict[str, Trial | None] = {}  # by run; None of one that is no trial

    def read(self) -> list[Trial]:
        """Every trial that has begun, in the order of their ids."""
        trials = {}
        for name in self._runs.names():
            begun = self._begun_trial(name)
            if begun is not None:
                history = (self._runs / name).read_json_lines(layout.METRICS)
                trials[begun.trial_id] = replace(begun, history=history)
        failed = sweep_folder(self._config, self._sweep) / FAILED
        for name in failed.names():
            trial_id, said = name.removesuffix(".json"), failed.read_json(name)
            begun = trials.get(trial_id)
            if begun is None:
                begun = Trial(trial_id, None, {}, [], self._config.train)
            trials[trial_id] = replace(
                begun, parameters=said["parameters"], problem=said["problem"]
            )
        return [trials[trial_id] for trial_id in sorted(trials)]

    def _begun_trial(self, name: str) -> Trial | None:
        """The trial that a run is, without its epochs; None of any other run."""
        matched, folder = self._pattern.fullmatch(name), self._runs / name
        if matched is None or (name not in self._begun and not folder.exists(layout.RUN)):
            return None
        if name not in self._begun:
            run = Run(folder, read_run_info(folder))
            saved = run.saved_config()
            flat = flatten(saved)
            parameters = {key: flat.get(key) for key in self._config.tune.space}
            # A run that somebody has named like a trial is tracked elsewhere.
            is_trial = saved.tracking.experiment == self._sweep
            begun = Trial(matched.group(1), run, parameters, [], saved.train)
            self._begun[name] = begun if is_trial else None
        return self._begun[name]
