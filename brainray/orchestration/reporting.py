"""Gathers the data for the report of a run or an evaluation."""

import platform
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from numpy.typing import NDArray

import brainray
from brainray import layout
from brainray.config import Config, EvaluationConfig
from brainray.config_text import flatten
from brainray.engine.compare import compare, without_comparison
from brainray.engine.explain import class_activation_maps, rows_to_explain
from brainray.engine.state import Checkpoint, load_checkpoint
from brainray.errors import (
    BrainrayError,
    CheckpointError,
    ConfigError,
    DataError,
    TransientError,
)
from brainray.log import log
from brainray.orchestration.code_version import code_hash, git_revision
from brainray.orchestration.run import (
    Run,
    check_same_draw,
    groups_of_test_slices,
    open_run,
    unfinished,
)
from brainray.orchestration.store import ImageStore, read_images
from brainray.redaction import command_line
from brainray.report.comparison_table import comparison_table
from brainray.report.maps import SliceMap, run_maps
from brainray.report.page import Explained, write_page
from brainray.schema import LABELLED, TEST, VALIDATION, Metrics
from brainray.storage import Folder

_MAY_DIFFER = {"objective", "dataset", "split", "evaluation"}
"""Settings that are not compared with a control's: what it is a control for, data and label draw,
which are compared themselves, and the scoring.
"""

LoadImages = Callable[[pa.Table], NDArray[np.uint8]]
"""Loads the preprocessed slices (n, 1, S, S) for rows of predictions."""


@dataclass(frozen=True)
class Report:
    """A report that was written."""

    folder: Folder
    metrics: Metrics


def report(config: Config) -> Report:
    """Rewrite the report of a complete run, comparing it with a control or runs with other seeds.

    Raises:
        ConfigError: no run named, a control on other labels, or a sibling with the same seed.
        DataError: no such run, or a run to compare with that does not fit.
        CheckpointError: the run, or one to compare with, is still training.
    """
    run = open_run(Folder(config.storage), config.given("run"))
    if not run.is_complete:
        raise CheckpointError(unfinished(Folder(config.storage), run))
    saved = run.saved_config()
    requested = config.evaluation.model_dump(exclude_unset=True)
    evaluation = saved.evaluation.model_copy(update=requested)
    merged = saved.model_copy(update={"storage": config.storage, "evaluation": evaluation})
    evaluation = without_lost_runs(merged, requested, run.record.data_hash)
    merged = merged.model_copy(update={"evaluation": evaluation})
    try:
        store = _store_with_test_slices(merged, run)
    except DataError as error:
        log(f"no activation maps: {error}")
        store = None
    summary = without_comparison(run.folder.read_json(layout.SUMMARY))
    for name in (requested.get("control"), *requested.get("siblings", ())):
        if name is not None and not (other := open_run(Folder(config.storage), name)).is_complete:
            raise CheckpointError(unfinished(Folder(config.storage), other))
    control = comparable_control(merged, run)
    comparison = against_control(merged, run, control, int(summary["chosen_epoch"]))
    metrics = summary | comparison
    known = run.folder.exists(layout.ABOUT)
    about = run.folder.read_json(layout.ABOUT) if known else about_software()
    maps = run_maps(run.folder, evaluation, int(metrics["chosen_epoch"]))
    if write_run_page(merged, run, control, metrics, about, maps, store) is None:
        raise DataError(f"the run {run.folder} has no test slices: there is nothing to report")
    # jobs/track.py sends the summary beside the page.
    if metrics != run.folder.read_json(layout.SUMMARY):
        run.folder.write_json(layout.SUMMARY, metrics)
    compared = comparison_table(comparison, evaluation.control)
    if compared is not None:
        log(f"{compared.title}:\n{compared.markdown()}")
    return Report(run.folder, metrics)


def _store_with_test_slices(config: Config, run: Run) -> ImageStore:
    """The run's image store, also if it was updated since, which leaves earlier slices unchanged.

    Raises:
        DataError: there is none, or it no longer has the run's test slices as they were.
    """
    store = ImageStore.open(Folder(config.storage) / layout.DATASETS / config.given("dataset"))
    if store.manifest.data_hash == run.record.data_hash:
        return store
    index = store.index()
    there = index.filter(pc.equal(index["split"], TEST))["sample_id"]
    tested = run.folder.read_table(layout.TEST_SLICES, columns=["sample_id"])["sample_id"]
    settings = store.manifest.preprocess, store.manifest.versions
    if (
        settings != (run.record.preprocess, run.record.versions)
        or not pc.all(pc.is_in(tested, value_set=there)).as_py()
    ):
        raise DataError(f"the image store {store.folder} no longer has the run's test slices")
    return store


def without_lost_runs(
    config: Config, requested: Container[str], data_hash: str
) -> EvaluationConfig:
    """Evaluation settings without compared runs that were set for training, and no longer exist or
    cannot be compared; names in ``requested``, set now, stay.
    """

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
    has_control = "control" not in requested and evaluation.control is not None
    if has_control and not is_comparable(partial(_control, config, data_hash)):
        evaluation = evaluation.model_copy(update={"control": None})
    if "siblings" not in requested:
        siblings = tuple(
            name
            for name in evaluation.siblings
            if is_comparable(partial(_sibling, config, name, data_hash))
        )
        evaluation = evaluation.model_copy(update={"siblings": siblings})
    return evaluation


@dataclass(frozen=True)
class Control:
    """A complete run on the same labels."""

    run: Run
    other_settings: str  # of training, apart from the objective's; empty if there are none


def comparable_control(config: Config, run: Run) -> Control | None:
    """The run ``evaluation.control`` if its metrics can be compared with the run's.

    Logs why they cannot, or what else the two differ in.
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
    return Control(control, others)


def against_control(
    config: Config, run: Run, control: Control | None, chosen_epoch: int
) -> Metrics:
    """Paired comparison of the run with its control, if there is one.

    Intervals resample copies and likely subjects as a whole.
    """
    if control is None:
        return {}
    ours, theirs = run.predictions(chosen_epoch), control.run.predictions()
    if ours is None or theirs is None:
        return {}
    groups = groups_of_test_slices(run.folder)
    resamples = config.evaluation.bootstrap_resamples
    return compare(ours, theirs, groups, num_resamples=resamples, seed=config.seed)


def write_run_page(
    config: Config,
    run: Run,
    control: Control | None,
    metrics: Metrics,
    about: Mapping[str, str],
    maps: Sequence[SliceMap],
    store: ImageStore | None,
) -> str | None:
    """Write a run's ``report.html``; without its store there are no activation maps."""
    explained = []
    chosen = layout.predictions_file(int(metrics["chosen_epoch"]))
    if store is not None and run.folder.exists(chosen):
        side = config.train.image_size

        def load(rows: pa.Table) -> NDArray[np.uint8]:
            return read_images(store.folder, rows["sample_id"].to_pylist(), TEST, side)

        checkpoint = load_checkpoint(run.folder / layout.BEST)
        explained = explain(run.folder.read_table(chosen), checkpoint, load)
    if control is not None:
        others = control.other_settings
        other = f", also trained with other settings: {others}" if others else ""
        about = {**about, "control": f"{config.evaluation.control}{other}"}
    return write_page(
        run.folder,
        run.record.classes,
        config.evaluation,
        metrics,
        about,
        maps,
        control=None if control is None else control.run.folder.read_json(layout.SUMMARY),
        explained=explained,
        siblings=_predictions_of_siblings(config, run),
    )


def explain(predictions: pa.Table, checkpoint: Checkpoint, load: LoadImages) -> list[Explained]:
    """Activation maps for samples of each class and of the errors."""
    chosen = predictions.take(rows_to_explain(predictions))
    if chosen.num_rows == 0:
        return []
    images = load(chosen)
    names = chosen["head"].to_pylist()
    classes = torch.tensor([checkpoint.classes.index(name) for name in names])
    maps = class_activation_maps(checkpoint, torch.from_numpy(images), classes).numpy()
    return [
        Explained(
            path=row["path"] + (f" {row['frame']}" if row["frame"] else ""),
            label=row["label"],
            predicted=row["head"],
            confidence=row["confidence"],
            image=image[0],
            activation=activation,
        )
        for row, image, activation in zip(
            chosen.select(["path", "frame", "label", "head", "confidence"]).to_pylist(),
            images,
            maps,
            strict=True,
        )
    ]


def about_software() -> dict[str, str]:
    """The command and the software versions for a report."""
    return {
        "command": command_line(),
        "code": f"brainray {brainray.__version__}, {code_hash()} {git_revision()}".strip(),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "ray": ray.__version__,
    }


def check_compared_runs(config: Config, data_hash: str) -> None:
    """Check the runs with which the report will compare this one; called before training.

    Raises:
        ConfigError: the control was trained on other labels, or a sibling has the same seed.
        DataError: there is no run of such a name, or it was trained on other data.
    """
    if config.evaluation.control is not None:
        _control(config, data_hash)
    for name in config.evaluation.siblings:
        _sibling(config, name, data_hash)


def _control(config: Config, data_hash: str) -> Run:
    """``evaluation.control``: a run on the same labels.

    Raises:
        ConfigError: it was trained on other labels.
        DataError: there is no run of that name, or it was trained on other data.
    """
    name = str(config.evaluation.control)
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
    sections = {key: value for key, value in run.settings.items() if key not in _MAY_DIFFER}
    last = run.folder.read_json_lines(layout.METRICS)[-1]
    return flatten(sections) | {"train.num_workers": int(last["train/num_workers"])}


def _predictions_of_siblings(config: Config, run: Run) -> dict[str, pa.Table]:
    """Predictions of complete runs with other seeds for the same test slices, by name."""
    siblings = {
        name: _sibling(config, name, run.record.data_hash).predictions()
        for name in config.evaluation.siblings
    }
    return {name: table for name, table in siblings.items() if table is not None}


def _labels_read(run: Run) -> set[tuple[str, str]]:
    """(sample_id, role) of the slices whose labels the run reads."""
    rows = run.folder.read_table(layout.SEEN, columns=["sample_id", "role"]).to_pylist()
    return {(r["sample_id"], r["role"]) for r in rows if r["role"] in (LABELLED, VALIDATION)}
