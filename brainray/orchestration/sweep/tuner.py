"""Ray Tune's part of a sweep: search space, algorithm, scheduler, and the state to resume from."""

import math
import os
import pickletools
import re
import sys
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from brainray.config import Config
from brainray.errors import ConfigError, DataError, StorageError
from brainray.log import log
from brainray.orchestration.ray_train import ray_storage
from brainray.orchestration.resources import WorkerResources
from brainray.orchestration.store import ImageStore
from brainray.orchestration.sweep.trials import read_trials, run_name, run_trial
from brainray.redaction import redacted
from brainray.storage import Folder

_TUNE = "tune"  # Tune's own state, inside the sweep's folder
_SESSION = re.compile(r".*state-(.+)\.(json|pkl)")


def build_tuner(
    config: Config, store: ImageStore, folder: Folder, workers: WorkerResources
) -> tune.Tuner:
    """A new Tuner, or the restored one of this sweep if its state is in ``folder``.

    Raises:
        ConfigError: that state is lost, or another version wrote it.
    """
    trainable = tune.with_resources(
        tune.with_parameters(
            run_trial,
            base=config.without_secrets().model_dump(mode="json"),
            data_hash=store.manifest.data_hash,
            command=[redacted(part) for part in sys.argv],  # saved by Ray and in storage
        ),
        # Trials only wait for their workers: they need no CPU, and run on the driver's node, which
        # has `encoder.weights`. A restored sweep takes the new driver's, too.
        {_this_machine(): 0.001},
    )
    # A stopped trial is blocked in Ray Train: force it to end, or its workers would stay.
    os.environ.setdefault("TUNE_FORCE_TRIAL_CLEANUP_S", "10")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # prints a banner whatever the verbosity
    # Tune's own handler would make an interrupted sweep look complete.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    own = folder / _TUNE
    if _has_state(config, own):
        where = ray_storage(own)
        try:
            return tune.Tuner.restore(
                where.pop("storage_path"),
                trainable,
                resume_errored=True,
                param_space=_param_space(config),
                **where,
            )
        except (AttributeError, ImportError) as error:  # from unpickling
            raise ConfigError(
                f"{own} was written by another version of brainray or Ray ({error}): resume the "
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
            **ray_storage(folder),
            failure_config=tune.FailureConfig(max_failures=config.train.max_failures),
            verbose=0,
        ),
    )


def _this_machine() -> str:
    """Ray's resource of the machine on which this process runs."""
    here = ray.get_runtime_context().get_node_id()
    (address,) = (node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)
    return f"node:{address}"


def _has_state(config: Config, folder: Folder) -> bool:
    """Whether Tune has saved a state to resume from; a partial one is replaced by the one before.

    Each session of Tune saves several files, and Tune reads those with the newest name. They must
    belong together: a searcher that counts a trial as running that the others do not know waits
    for ever. Deleted files would return, since Tune keeps copies on the driver's machine.

    Raises:
        ConfigError: there is none, but trials exist that Tune would not know about.
    """
    sessions = {found[1] for name in folder.names() if (found := _SESSION.fullmatch(name))}
    partial: list[str] = []
    for session in sorted(sessions, reverse=True):
        if _is_whole(config, folder, session):
            for later in partial:
                _copy_session(config, folder, session, later)
            return True
        partial.append(session)
    if not folder.names():
        return False
    begun = read_trials(config)
    if begun:
        raise ConfigError(
            f"{folder} has lost Tune's state, which records the sampled trials: choose another "
            f"name for the sweep, or delete {folder.parent} and its {len(begun)} runs, such as "
            f"{run_name(config, begun[0].trial_id)}"
        )
    folder.delete()
    return False


def _is_whole(config: Config, folder: Folder, session: str) -> bool:
    """Whether all that a session of Tune needs was written to its end."""
    trials, *searcher = _files_of(config, session)
    try:
        folder.read_json(trials)
        for name in ("tuner.pkl", *searcher):
            for _ in pickletools.genops(folder.read_bytes(name)):  # executes nothing
                pass
    except StorageError:  # does not mean that the file is damaged
        raise
    except (DataError, ValueError) as damage:
        log(f"{folder}: ignoring Tune's state of {session}, partially written ({damage})")
        return False
    return True


def _copy_session(config: Config, folder: Folder, whole: str, partial: str) -> None:
    """Give a session the files of another; until all are copied, it remains partial."""
    sources, targets = _files_of(config, whole), _files_of(config, partial)
    folder.delete_file(targets[0], missing_ok=True)
    for source, target in reversed(list(zip(sources, targets, strict=True))):
        folder.write_bytes(target, folder.read_bytes(source))


def _files_of(config: Config, session: str) -> list[str]:
    """The files of a session of Tune: its trials (JSON), and its searcher (pickles)."""
    searcher = ["basic-variant-state-{}.json"]
    if config.tune.algorithm == "optuna":
        searcher = ["search_gen_state-{}.json", "searcher-state-{}.pkl"]
    return [name.format(session) for name in ["experiment_state-{}.json", *searcher]]


def _param_space(config: Config) -> dict[str, Any]:
    grid = config.tune.algorithm == "grid"
    domains: dict[str, Callable[[list[Any]], Any]] = {
        "choice": tune.grid_search if grid else tune.choice,
        "uniform": lambda ends: tune.uniform(*ends),
        "log_uniform": lambda ends: tune.loguniform(*ends),
        "integer": lambda ends: tune.randint(int(ends[0]), int(ends[1]) + 1),
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
        optuna = OptunaSearch(metric=settings.metric, mode=settings.mode, seed=config.seed)
        return ConcurrencyLimiter(optuna, max_concurrent=concurrent)
    return BasicVariantGenerator(max_concurrent=concurrent, random_state=config.seed)


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
        if action == self.PAUSE:  # pausing would make the trial repeat its epoch
            return self.CONTINUE
        num_epochs = trial.config.get("train.num_epochs", self._num_epochs)
        # Halving also stops at the base's number of epochs, which a trial may exceed.
        is_late = result["epoch"] >= min(num_epochs, self._num_epochs)
        return self.CONTINUE if is_late else action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if math.isfinite(result.get(self.metric, math.nan)):
            super().on_trial_complete(tune_controller, trial, result)


class _Halving(_FairToTrials, AsyncHyperBandScheduler):
    pass


class _MedianStopping(_FairToTrials, MedianStoppingRule):
    pass


def errors_of(results: tune.ResultGrid) -> dict[str, str]:
    """The last line of the error of each trial that Tune gave up on."""
    return {
        str(result.metrics["trial_id"]): str(result.error).strip().splitlines()[-1]
        for result in (results[number] for number in range(len(results)))
        if result.error is not None and result.metrics and "trial_id" in result.metrics
    }
