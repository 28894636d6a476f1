"""The runs with which a report compares a run: a control, and runs with other seeds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from brainray import layout
from brainray.config import Config, EvaluationConfig
from brainray.config_text import flatten
from brainray.engine.compare import compare
from brainray.errors import BrainrayError, ConfigError, DataError, TransientError
from brainray.log import log
from brainray.orchestration.run import (
    Run,
    check_same_draw,
    groups_of_test_slices,
    lasting_settings,
    open_run,
)
from brainray.schema import LABELLED, VALIDATION, Metrics
from brainray.storage import Folder

_MAY_DIFFER = {"objective", "dataset", "split", "evaluation"}
"""Settings that are not compared with a control's: what it is a control for, data and label draw,
which are compared themselves, and the scoring.
"""


def check_compared_runs(config: Config, data_hash: str) -> None:
    """Check the runs with which the report will compare this one; called before training.

    Raises:
        ConfigError: the control is this run or was trained on other labels, or a sibling has the
            same seed.
        DataError: there is no run of such a name, or it was trained on other data.
    """
    if config.evaluation.control is not None:
        _control(config, data_hash)
    for name in config.evaluation.siblings:
        _sibling(config, name, data_hash)


def without_lost_runs(config: Config, data_hash: str) -> EvaluationConfig:
    """Evaluation settings without compared runs that no longer exist or cannot be compared."""

    def is_comparable(find: Callable[[], Run]) -> bool:
        try:
            find()
        except TransientError:
            raise
        except BrainrayError as problem:
            log(f"not compared: {problem}")
            return False
        return True

    evaluation = config.evaluation
    control = evaluation.control
    if control is not None and not is_comparable(partial(_control, config, data_hash)):
        control = None
    siblings = tuple(
        name
        for name in evaluation.siblings
        if is_comparable(partial(_sibling, config, name, data_hash))
    )
    return evaluation.model_copy(update={"control": control, "siblings": siblings})


@dataclass(frozen=True)
class Control:
    """A complete run on the same labels, with which a run is compared."""

    run: Run
    other_settings: str  # of training, apart from the objective's; empty if there are none
    comparison: Metrics  # slice by slice (`compare`); empty without predictions


def compare_with_control(config: Config, run: Run, chosen_epoch: int) -> Control | None:
    """The run ``evaluation.control`` if its metrics can be compared with the run's.

    Logs why they cannot, or what else the two differ in. Intervals resample copies and likely
    subjects as a whole.
    """
    if config.evaluation.control is None:
        return None
    control = _control(config, run.record.data_hash)
    problem = _not_comparable(run, control)
    if problem is not None:
        log(f"not compared: the run {config.evaluation.control} {problem}")
        return None
    others = _other_settings(run, control)
    if others:
        log(f"note: the control was also trained with other settings: {others}")
    ours, theirs = run.predictions(chosen_epoch), control.predictions()
    if ours is None or theirs is None:
        return Control(control, others, {})
    groups = groups_of_test_slices(run.folder)
    resamples = config.evaluation.bootstrap_resamples
    found = compare(ours, theirs, groups, num_resamples=resamples, seed=config.seed)
    return Control(control, others, found)


def predictions_of_siblings(config: Config, run: Run) -> dict[str, pa.Table]:
    """Predictions of complete runs with other seeds for the same test slices, by name."""
    siblings = {
        name: _sibling(config, name, run.record.data_hash).predictions()
        for name in config.evaluation.siblings
    }
    return {name: table for name, table in siblings.items() if table is not None}


def _control(config: Config, data_hash: str) -> Run:
    """``evaluation.control``: a run on the same labels.

    Raises:
        ConfigError: it is this run, or was trained on other labels.
        DataError: there is no run of that name, or it was trained on other data.
    """
    name = str(config.evaluation.control)
    if name == config.name:
        raise ConfigError(f"evaluation.control={name} is the run itself: name another one")
    control = _compared_run(config, name, data_hash)
    check_same_draw(config.split, control, f"evaluation.control={name}")
    return control


def _sibling(config: Config, name: str, data_hash: str) -> Run:
    """A run of ``evaluation.siblings``, which must have a different seed.

    Raises:
        ConfigError: it has this run's seed, or is this run.
        DataError: there is no run of that name, or it was trained on other data.
    """
    sibling = _compared_run(config, name, data_hash)
    if sibling.saved_config().seed == config.seed:
        raise ConfigError(
            f"evaluation.siblings: the run {name} has the same seed ({config.seed}) and would find "
            "the same clusters: name runs with other seeds"
        )
    return sibling


def _compared_run(config: Config, name: str, data_hash: str) -> Run:
    run = open_run(Folder(config.storage), name)
    if run.record.data_hash != data_hash:
        if run.record.dataset == config.dataset:
            raise DataError(
                f"evaluation.control and siblings: the image store {config.dataset} was updated "
                f"between this run and the run {name}: train both on its current state, under "
                "other names"
            )
        raise DataError(
            f"evaluation.control and siblings: the run {name} was trained on other data: name runs "
            "on the same image store"
        )
    return run


def _not_comparable(run: Run, control: Run) -> str | None:
    """Why a control's metrics cannot be compared with a run's; None if they can."""
    if not control.is_complete:
        return f"is still training; run jobs/report.py --set run={run.folder.name} later"
    if _labels_read(run) != _labels_read(control):  # drawn by another version
        return "was trained on other labels"
    return None


def _other_settings(run: Run, control: Run) -> str:
    """Settings of training other than the objective's in which a control differs, or empty."""
    ours, theirs = (_trained_with(each) for each in (run, control))
    return ", ".join(
        f"{key} {theirs[key]} (here {ours[key]})"
        for key in sorted(ours.keys() & theirs.keys())  # without those of one's warm-up alone
        if ours[key] != theirs[key]
    )


def _trained_with(run: Run) -> dict[str, str | int | float | bool]:
    settings = lasting_settings(run.saved_config())
    sections = {key: value for key, value in settings.items() if key not in _MAY_DIFFER}
    last = run.folder.read_json_lines(layout.METRICS)[-1]
    return flatten(sections) | {"train.num_workers": int(last["train/num_workers"])}


def _labels_read(run: Run) -> set[tuple[str, str]]:
    """(sample_id, role) of the slices whose labels the run reads."""
    rows = run.folder.read_table(layout.SEEN, columns=["sample_id", "role"]).to_pylist()
    return {(r["sample_id"], r["role"]) for r in rows if r["role"] in (LABELLED, VALIDATION)}
