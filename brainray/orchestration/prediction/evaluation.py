"""Evaluation of a run on raw class folders, using the same code path as prediction."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainray import layout
from brainray.config import Config, PreprocessConfig
from brainray.config_text import flatten, parse_saved, to_yaml
from brainray.engine.evaluate import summarise
from brainray.engine.slice_model import stored_pixels
from brainray.errors import DataError
from brainray.log import log
from brainray.mri.groups import conflicting_groups, joint_groups
from brainray.mri.leakage import Fingerprints, exposure
from brainray.mri.slices import RejectedImage, commonest_reasons
from brainray.orchestration.blocks import with_progress
from brainray.orchestration.lock import held
from brainray.orchestration.prediction.inference import (
    Predictor,
    default_name,
    find_predictor,
    predicted_blocks,
)
from brainray.orchestration.preprocessing.grouping import group_strangers
from brainray.orchestration.preprocessing.leakage import LEVELS, twins_of_test_slices
from brainray.orchestration.preprocessing.slice_rows import (
    CHANGED,
    NO_CLASS_TO_SCORE,
    preprocess_file,
    read_file,
)
from brainray.orchestration.preprocessing.source import (
    FoundFile,
    Listing,
    SourceFile,
    check_frames,
    list_source,
    renaming_advice,
)
from brainray.orchestration.preprocessing.subject_salt import salt_id, subject_salt
from brainray.orchestration.provenance import about_software
from brainray.orchestration.records import check_same_settings
from brainray.orchestration.run import Run, groups_of_test_slices
from brainray.orchestration.run_report import explain, software_rows
from brainray.report.evaluation_figures import draw_evaluation_figures
from brainray.report.page import Explained, write_evaluation_page
from brainray.schema import PREDICTIONS, REJECTED, TEST, Metrics
from brainray.storage import Folder

_MAX_NAMED = 5  # classes in an error
_OUTSIDE_OF_TEST, _WITHOUT_CLASS = "outside the test split", "without a class"


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation and the folder of its files."""

    folder: Folder
    metrics: Metrics
    classes: list[str]


def evaluate(config: Config, only_paths: set[str] | None = None) -> Evaluation:
    """Predict the labelled slices of ``config.source`` with a run's chosen epoch, and score them.

    Slices are preprocessed with the run's own settings. If the source has a test split, only that
    split is scored, unless ``only_paths`` selects the files. ``clean`` and ``strict`` are relative
    to the fingerprints stored with the run; a checkpoint without its run has none, so these metrics
    are left out.

    Raises:
        ConfigError: a name already used for the evaluation of another model or source.
        DataError: nothing readable or labelled, or a class that is unknown to the run.
        CheckpointError: the checkpoint is missing or is not one.
    """
    predictor = find_predictor(config)
    storage, name = Folder(config.storage), config.name or default_name(config, predictor)
    with held(storage, layout.EVALUATIONS, name):
        return _evaluate(config, predictor, storage / layout.EVALUATIONS / name, only_paths)


def _evaluate(
    config: Config, predictor: Predictor, target: Folder, only_paths: set[str] | None
) -> Evaluation:
    model = _model_of(config, predictor)
    _check_source(config, model, target, from_pipeline=only_paths is not None)
    checkpoint, seen = predictor.checkpoint, predictor.seen()
    labels = None if config.labels is None else Folder(config.labels)
    # The split of selected paths is known; a table may use another name for it.
    listing = list_source(
        Folder(config.given("source")),
        labels,
        config.classes.map,
        reads_splits=only_paths is None,
        storage=Folder(config.storage),
    )
    files, left_out = _files_to_score(listing, config, checkpoint.classes, only_paths)
    counts = ", ".join(f"{count} {why}" for why, count in left_out.items() if count)
    left_out_note = f"; left out: {counts}" if counts else ""
    log(
        f"evaluating {predictor.folder} (epoch {checkpoint.epoch}) on {len(files)} files"
        f"{left_out_note}{listing.remarks}"
    )
    rows = _predict_files(files, config, predictor)
    check_frames(files, rows)
    has_class = pc.invert(pc.fill_null(pc.equal(rows["reason"], NO_CLASS_TO_SCORE), False))
    num_without_class = rows.num_rows - pc.sum(has_class).as_py()
    if num_without_class:
        log(f"left out: {num_without_class} slices without a class in files with labelled slices")
    if num_without_class == rows.num_rows:
        raise DataError(f"source={config.source}: no slice has a class to score")
    accepted, rejected = _by_usability(rows.filter(has_class), config)
    known = {} if predictor.run is None else groups_of_test_slices(predictor.run.folder)
    predictions, twins = _with_subset_columns(accepted, seen, config, predictor, known)
    metrics = summarise(
        predictions,
        None if seen is None else seen.filter(pc.invert(seen["elsewhere"])),
        checkpoint.classes,
        num_resamples=config.evaluation.bootstrap_resamples,
        seed=config.seed,
        groups=_groups(accepted, predictor.preprocess, known),
        temperature=predictor.temperature(),
    )
    metrics |= {
        "num_rejected": float(rejected.num_rows),
        "num_ignored_files": float(listing.num_ignored),
        "num_outside_of_test": float(left_out[_OUTSIDE_OF_TEST]),
        "num_without_class": float(left_out[_WITHOUT_CLASS]),
        "num_slices_without_class": float(num_without_class),
        "epoch": float(checkpoint.epoch),
    }
    if target.exists():
        log(f"{target}: replacing the earlier evaluation of this name")
    explained = _explained(predictions, config, predictor)
    num_seen = None if twins is None else {level: len(found) for level, found in twins.items()}
    about = software_rows(about_software())
    about |= {"model": str(predictor.folder), "source": config.given("source")}
    with target.rebuilt(layout.EVALUATION_METRICS) as folder:
        made_by = to_yaml(_settings(config, predictor, model))
        folder.write_bytes(layout.CONFIG, made_by.encode())
        folder.write_table(layout.EVALUATION_PREDICTIONS, predictions)
        if twins is not None:
            folder.write_json(layout.LEAKAGE, {"levels": LEVELS, "seen_by_run": twins})
        folder.write_table(layout.REJECTED, rejected)
        draw_evaluation_figures(folder, predictions, checkpoint.classes)
        write_evaluation_page(
            folder,
            target.name,
            predictions,
            rejected=rejected,
            classes=checkpoint.classes,
            evaluation=config.evaluation,
            metrics=metrics,
            about=about,
            settings=made_by,
            explained=explained,
            num_seen=num_seen,
        )
        folder.write_json(layout.EVALUATION_METRICS, metrics)
    return Evaluation(target, metrics, checkpoint.classes)


def _with_subset_columns(
    accepted: pa.Table,
    seen: pa.Table | None,
    config: Config,
    predictor: Predictor,
    known: Mapping[str, str],
) -> tuple[pa.Table, dict[str, list[dict[str, Any]]] | None]:
    """PREDICTIONS with the ``clean`` and ``strict`` columns filled; and, by level, the slices
    with a match in the run's data. None if there is no record of that data. Slices that are not
    ``known`` test slices of the run are from elsewhere; known ones keep their columns of training,
    for which a labels table may have named other subjects.
    """
    predictions = accepted.select(PREDICTIONS.names).cast(PREDICTIONS)
    if seen is None or predictor.run is None:
        log(f"no record of what {predictor.folder} was trained on: no slice is marked as clean")
        return predictions, None
    queries = with_comparable_names(accepted, config, predictor.run)
    elsewhere = [identity not in known for identity in queries["sample_id"].to_pylist()]
    queries = queries.append_column("elsewhere", pa.array(elsewhere, pa.bool_()))
    groups = [known.get(identity) for identity in queries["sample_id"].to_pylist()]
    queries = queries.append_column("split_group_id", pa.array(groups, pa.string()))
    exposed = exposure(
        Fingerprints.from_table(queries), Fingerprints.from_table(seen), predictor.preprocess
    )
    columns = exposed.columns
    if known:
        trained = predictor.run.folder.read_table(layout.TEST_SLICES, ["sample_id", *columns])
        rows = pc.index_in(queries["sample_id"], value_set=trained["sample_id"])
        columns = {
            name: pc.if_else(pc.is_valid(rows), trained[name].take(rows), flags)
            for name, flags in columns.items()
        }
    for name, flags in columns.items():
        predictions = predictions.set_column(PREDICTIONS.get_field_index(name), name, flags)
    if not any(exposed.clean):
        log("note: the run has seen every slice, or a copy of it: there are no clean metrics")
    twins = twins_of_test_slices(accepted, seen, exposed)
    counts = ", ".join(f"{len(found)} {level}" for level, found in twins.items() if found)
    if counts:
        log(f"slices with a match in the run's data, by level: {counts} ({layout.LEAKAGE})")
    num_conflicting = sum(
        slice_["twin_label"] not in {None, slice_["label"]}
        for level in ("exact", "near")
        for slice_ in twins[level]
    )
    if num_conflicting:
        log(
            f"note: slices labelled differently from the copy in the run's data: {num_conflicting} "
            f"({layout.LEAKAGE})"
        )
    return predictions, twins


def _settings(config: Config, predictor: Predictor, model: dict[str, Any]) -> Config:
    """The run's settings with those that name the ``model``, and with those that an evaluation
    reads taken from its own configuration.
    """
    trained = predictor.checkpoint.config
    read = ("source", "labels", "classes", "name", "storage", "seed")
    train = config.train.model_dump(include={"device", "precision"})
    evaluation = config.evaluation.model_dump(include={"bootstrap_resamples", "tsne_max_slices"})
    sections = {
        "preprocess": predictor.preprocess,
        "train": trained.train.model_copy(update=train),
        "evaluation": trained.evaluation.model_copy(update=evaluation),
    }
    own = {name: getattr(config, name) for name in read}
    return trained.model_copy(update=own | model | sections)


def _model_of(config: Config, predictor: Predictor) -> dict[str, Any]:
    """The settings that name a model, the same ones however it was requested: those of its run if
    the storage has it, otherwise the folder of its checkpoint.
    """
    run, runs = predictor.run, Folder(config.storage) / layout.RUNS
    if run is None or not (runs / run.folder.name).contains(run.folder):
        return {"run": None, "epoch": None, "checkpoint": predictor.folder.uri}
    is_chosen = config.epoch is None and predictor.folder.name == layout.BEST
    epoch = None if is_chosen else predictor.checkpoint.epoch
    return {"run": run.folder.name, "epoch": epoch, "checkpoint": None}


def _by_usability(rows: pa.Table, config: Config) -> tuple[pa.Table, pa.Table]:
    """Predictions, and ``REJECTED`` rows of what could not be used."""
    rejected = rows.filter(pc.is_valid(rows["reason"])).select(REJECTED.names).cast(REJECTED)
    accepted = rows.filter(pc.is_null(rows["reason"]))
    reasons = zip(rejected["reason"].to_pylist(), rejected["detail"].to_pylist(), strict=True)
    commonest = commonest_reasons(list(reasons))
    if accepted.num_rows == 0:
        num_files = len(set(rejected["path"].to_pylist()))
        raise DataError(f"none of the {num_files} files in {config.source} is usable: {commonest}")
    if rejected.num_rows:
        log(f"{rejected.num_rows} files or slices could not be used: {commonest}")
    return accepted, rejected


def _groups(
    accepted: pa.Table, preprocess: PreprocessConfig, known: Mapping[str, str]
) -> Mapping[str, str]:
    """Groups of slices that are resampled together for intervals: as ``known`` for the run's own
    test slices, otherwise also by image similarity and by subject.
    """
    ids = accepted["sample_id"].to_pylist()
    as_known = [known.get(identity) for identity in ids]
    if None not in as_known:
        return known
    # The run's own test slices may be among them, and others may be copies of these.
    found = group_strangers(accepted, preprocess)
    conflicting = conflicting_groups(found.copies, accepted["label"].to_pylist())
    if num_conflicting := sum(group in conflicting for group in found.copies):
        log(f"note: slices with a copy of another label in this source: {num_conflicting}")
    return dict(zip(ids, joint_groups(found.dependent, as_known), strict=True))


def check_evaluation_name(config: Config) -> None:
    """Raises ConfigError if a pipeline's name is used for another evaluation."""
    target = Folder(config.storage) / layout.EVALUATIONS / config.given("name")
    model = {"run": config.name, "epoch": None, "checkpoint": None}
    _check_source(config, model, target, from_pipeline=True)


def _check_source(
    config: Config, model: dict[str, Any], target: Folder, *, from_pipeline: bool
) -> None:
    """Check that an evaluation of this name, if there is one, is of the same ``model`` (see
    `_model_of`) and source: folders in different places may share a name, and so may evaluations.

    Raises:
        ConfigError: the name is used for another evaluation.
    """
    if not target.exists(layout.CONFIG):
        return
    before = parse_saved(target.read_bytes(layout.CONFIG), f"{target}/{layout.CONFIG}")
    made_with, wanted = {key: getattr(before, key) for key in model}, model
    if not from_pipeline:  # whose files may have been moved
        made_with |= {"source": Folder(before.given("source")).uri}
        wanted = model | {"source": Folder(config.given("source")).uri}
    remedy = "choose another name with --set name=NAME, or delete it"
    check_same_settings(f"evaluation {target}", flatten(made_with), flatten(wanted), remedy)


def _files_to_score(
    listing: Listing, config: Config, classes: list[str], only_paths: set[str] | None
) -> tuple[list[SourceFile], Counter[str]]:
    """Labelled files, of the test split if there is one; and the number left out, by reason."""
    files, left_out = listing.files, Counter[str]()
    if only_paths is not None:
        files = [file for file in files if file.path in only_paths]
        missing = only_paths - {file.path for file in files}
        if missing:
            raise DataError(
                f"source={config.source} lacks {len(missing)} of {len(only_paths)} files to score, "
                f"such as {min(missing)}"
            )
    elif any(file.split == TEST for file in files):
        files = [file for file in files if file.split == TEST]
        left_out[_OUTSIDE_OF_TEST] = len(listing.files) - len(files)
    labelled = [file for file in files if file.labels]
    if not labelled:
        remedy = "give class folders or a labels table"
        if config.labels is not None:
            remedy = f"add labels to {config.labels}, or check that classes.map keeps them"
        raise DataError(f"source={config.source}: no slice has a class to score; {remedy}")
    if only_paths is None:
        left_out[_WITHOUT_CLASS] = len(files) - len(labelled)
    unknown = Counter(label for file in labelled for label in file.labels - set(classes))
    if unknown:
        raise DataError(
            f"{config.source} has classes unknown to the run (it knows {', '.join(classes)}): "
            f"{_counted(unknown)}; {renaming_advice(unknown, config.classes.map)}"
        )
    return labelled, left_out


def _counted(names: Counter[str]) -> str:
    listed = [f"{name!r} ({count} files)" for name, count in sorted(names.items())[:_MAX_NAMED]]
    more = len(names) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")


def with_comparable_names(accepted: pa.Table, config: Config, run: Run) -> pa.Table:
    """Drop subject names unless they are hashed with the run's salt: others cannot be matched, and
    their slices are compared by image similarity.
    """
    if run.record.subject_salt == salt_id(subject_salt(Folder(config.storage))):
        return accepted
    return accepted.drop_columns("subject_source")


def _explained(predictions: pa.Table, config: Config, predictor: Predictor) -> list[Explained]:
    try:
        return explain(predictions, predictor.checkpoint, partial(_load_again, config, predictor))
    except RejectedImage as rejection:  # a file that was readable a moment ago
        log(f"no activation maps: a file was changed or deleted meanwhile ({rejection.reason})")
        return []


def _load_again(config: Config, predictor: Predictor, rows: pa.Table) -> NDArray[np.uint8]:
    """Slices (n, 1, S, S) of a few predictions: the actors do not return pixels."""
    source, salt = Folder(config.given("source")), subject_salt(Folder(config.storage))
    slices: dict[tuple[str, str], dict[str, Any]] = {}
    for path in pc.unique(rows["path"]).to_pylist():
        file = FoundFile(path, 0, 0)
        parts = preprocess_file(read_file(source, file), file, predictor.preprocess, salt)
        slices |= {(path, part["frame"]): part for part in parts}
    places = list(zip(rows["path"].to_pylist(), rows["frame"].to_pylist(), strict=True))
    if any(slices.get(place, {}).get("image") is None for place in places):
        raise RejectedImage(CHANGED)
    found = [slices[place] for place in places]
    columns = {name: [part[name] for part in found] for name in ("image", "height", "width")}
    return stored_pixels(pa.table(columns), predictor.checkpoint.image_size)


def _predict_files(files: list[SourceFile], config: Config, predictor: Predictor) -> pa.Table:
    """One row per slice, sorted by path: PREDICTIONS columns, or reason and detail."""
    blocks = predicted_blocks(files, config, predictor)
    batches = list(with_progress(blocks, len(files), "predicted"))
    return pa.concat_tables(batches).sort_by([("path", "ascending"), ("frame", "ascending")])
