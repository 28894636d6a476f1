"""Resumable prediction for a folder with any number of slices or volumes."""

import json
import re
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from brainray import layout
from brainray.config import Config
from brainray.engine.slice_model import Reference
from brainray.errors import DataError
from brainray.log import log
from brainray.mri.identity import content_hash
from brainray.orchestration.blocks import with_progress
from brainray.orchestration.code_version import code_hash
from brainray.orchestration.job import JobResult
from brainray.orchestration.lock import held
from brainray.orchestration.prediction.inference import (
    Predictor,
    default_name,
    find_predictor,
    predicted_blocks,
)
from brainray.orchestration.preprocessing.slice_rows import CHANGED, UNREADABLE
from brainray.orchestration.preprocessing.source import (
    FoundFile,
    SourceFile,
    find_images,
    ignored_note,
)
from brainray.orchestration.records import check_same_settings
from brainray.schema import PREDICTED_FILES, Metrics
from brainray.storage import Folder, without_formulas

_SETTINGS = "_settings.json"  # Parquet dataset readers ignore names with a leading underscore
_ROWS_PER_PART = 4096
_IN_CSV = [
    "path",
    "frame",
    "class",
    "confidence",
    "cluster",
    "cluster_class",
    "outlier_score",
    "reason",
]
_PART = re.compile(r"part-(\d+)\.parquet")  # as `layout.PART` writes it


def predict(config: Config) -> JobResult:
    """Write a row for every slice in ``config.source``, and for every unreadable file.

    Rows are written to ``storage/predictions/NAME/part-*.parquet`` (``PREDICTED_FILES``) as they
    are computed, and at the end, the main columns, to ``_predictions.csv``. With the same name, the
    job resumes: it predicts files that are new, were unreadable or have been replaced. Rows of
    deleted files stay.

    Raises:
        ConfigError: a name used with other settings.
        DataError: no image file, or none that can be read.
        CheckpointError: the checkpoint is missing or invalid.
    """
    predictor = find_predictor(config)
    storage, name = Folder(config.storage), config.name or default_name(config, predictor)
    with held(storage, layout.PREDICTIONS, name):
        return _predict(config, predictor, storage / layout.PREDICTIONS / name)


def _predict(config: Config, predictor: Predictor, folder: Folder) -> JobResult:
    found, ignored = find_images(Folder(config.given("source")), Folder(config.storage))
    _check_or_write_settings(config, predictor, folder)
    done, num_replaced = _drop_stale_rows(folder, found)
    folder.delete_file(layout.PREDICTIONS_CSV, missing_ok=True)  # rewritten at the end
    files = [SourceFile(file=file) for file in found if file.path not in done]
    log(
        f"predicting {len(found)} files with {predictor.folder} (epoch "
        f"{predictor.checkpoint.epoch})"
        + (f"; {len(done)} are done" if done else "")
        + (f"; {num_replaced} were replaced and are predicted again" if num_replaced else "")
        + ignored_note(ignored)
    )
    reference = Reference(predictor.fitted())
    if reference.is_empty:
        log(
            f"{predictor.folder} has no record of its training slices: outlier_score and nearest "
            "stay empty"
        )
    if files:
        blocks = predicted_blocks(files, config, predictor)
        _write_parts(blocks, files, folder, reference, predictor.checkpoint.classes)
    metrics = _finish(folder)
    if metrics["num_predicted"] == 0:
        raise DataError(
            f"none of the {len(found)} files in {config.source} is usable: see column reason in "
            f"{folder}"
        )
    return JobResult(str(folder), metrics=metrics)


def _check_or_write_settings(config: Config, predictor: Predictor, folder: Folder) -> None:
    about = {"checkpoint": str(predictor.folder)}  # which may move
    settings = {
        "source": Folder(config.given("source")).uri,
        "epoch": predictor.checkpoint.epoch,
        "weights": content_hash(predictor.folder.read_bytes(layout.MODEL))[:12],
        "has_fitted": predictor.folder.exists(layout.FITTED),
        "classes": predictor.checkpoint.classes,
        "code": code_hash(),
    }
    if not folder.exists(_SETTINGS):
        folder.write_json(_SETTINGS, about | settings)
        return
    stored = folder.read_json(_SETTINGS)
    made_with = {key: value for key, value in stored.items() if key not in about}
    check_same_settings(f"prediction {folder}", made_with, settings, "choose another name")


def _parts(folder: Folder) -> list[str]:
    return [name for name in folder.names() if _PART.fullmatch(name)]


def _drop_stale_rows(folder: Folder, found: Iterable[FoundFile]) -> tuple[set[str], int]:
    """Drop rows of files that could not be read (because of a mount, a network or a writer) or have
    changed since, by size or modification time; returns the paths with rows left, and the number
    of changed files.
    """
    now = {file.path: (file.num_bytes, file.mtime_ns) for file in found}
    done: set[str] = set()
    replaced: set[str] = set()
    for name in _parts(folder):
        stored = folder.read_table(name, columns=["path", "reason", "num_bytes", "mtime_ns"])
        kept = []
        for row in stored.to_pylist():
            stamp = (row["num_bytes"], row["mtime_ns"])
            is_unread = row["reason"] in {UNREADABLE, CHANGED}
            is_other = now.get(row["path"], stamp) != stamp
            if is_other and not is_unread:
                replaced.add(row["path"])
            is_kept = not is_unread and not is_other
            kept.append(is_kept)
            if is_kept:
                done.add(row["path"])
        if not all(kept):
            folder.write_table(name, folder.read_table(name).filter(pa.array(kept, pa.bool_())))
    return done, len(replaced)


def _write_parts(
    blocks: ray.data.Dataset,
    files: list[SourceFile],
    folder: Folder,
    reference: Reference,
    classes: Sequence[str],
) -> None:
    """Write parts of some thousand rows, with the order of the probabilities as metadata.

    Files are not split, as a block contains whole files.
    """
    # One above the highest: a part may have been deleted to be made again.
    numbers = [int(found[1]) for name in folder.names() if (found := _PART.fullmatch(name))]
    number = max(numbers, default=-1) + 1
    waiting: list[pa.Table] = []

    def flush() -> None:
        nonlocal number, waiting
        if waiting:
            part = pa.concat_tables(waiting)
            folder.write_table(layout.PART.format(number=number), part)
            number, waiting = number + 1, []

    for block in with_progress(blocks, len(files), "predicted"):
        stamps = block.select(["num_bytes", "mtime_ns"])
        columns = [*reference.rows(block).columns, *stamps.columns]
        rows = pa.table(columns, schema=PREDICTED_FILES)
        waiting.append(rows.replace_schema_metadata({"classes": json.dumps(classes)}))
        if sum(table.num_rows for table in waiting) >= _ROWS_PER_PART:
            flush()
    flush()


def _finish(folder: Folder) -> Metrics:
    """Write the parts' columns for spreadsheets, and count their rows; one part in memory at a
    time.
    """
    metrics: Metrics = {"num_files": 0.0, "num_predicted": 0.0, "num_rejected": 0.0}
    schema = pa.schema([PREDICTED_FILES.field(name) for name in _IN_CSV])
    with folder.csv_writer(layout.PREDICTIONS_CSV, schema) as writer:
        for name in _parts(folder):
            part = folder.read_table(name, columns=_IN_CSV).replace_schema_metadata()
            writer.write_table(without_formulas(part))
            predicted = part.filter(pc.is_null(part["reason"]))
            metrics["num_files"] += pc.count_distinct(part["path"]).as_py()
            metrics["num_predicted"] += predicted.num_rows
            metrics["num_rejected"] += part.num_rows - predicted.num_rows
            for counted in pc.value_counts(predicted["class"]).to_pylist():
                key = f"num_predicted/{counted['values']}"
                metrics[key] = metrics.get(key, 0.0) + counted["counts"]
    return metrics
