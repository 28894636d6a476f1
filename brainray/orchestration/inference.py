"""Evaluation of a run on raw class folders: Ray Data decodes, actors embed."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch

from brainray import layout
from brainray.config import Config, PreprocessConfig
from brainray.engine.epoch import embed
from brainray.engine.evaluate import (
    Metrics,
    gather_predictions,
    predictions_table,
    summarise,
)
from brainray.engine.recipe import resolve_precision
from brainray.engine.state import Checkpoint, load_checkpoint
from brainray.errors import ConfigError, DataError
from brainray.mri.decode import RejectedImage
from brainray.mri.leakage import Fingerprints, exposure
from brainray.orchestration.data import with_progress
from brainray.orchestration.preparation import (
    SLICES,
    preprocess_file,
    read_file,
    rejected_row,
    subject_salt,
)
from brainray.orchestration.run import open_run, read_run_info
from brainray.orchestration.source import FoundFile, SourceFile, list_source
from brainray.report.evaluation_figures import draw_evaluation_figures
from brainray.schema import GIVEN, PREDICTIONS, REJECTED, TEST, UNLABELLED
from brainray.storage import Folder

Log = Callable[[str], None]

_FILES_PER_TASK = 128


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation and where its files are."""

    folder: Folder
    metrics: Metrics
    classes: list[str]


def evaluate(config: Config, log: Log = print, only_paths: set[str] | None = None) -> Evaluation:
    """Predict the labelled slices of ``config.source`` with a run's chosen epoch, and score them.

    Slices are preprocessed with the run's own settings. Where the source has a test split, only
    that is scored; ``only_paths`` chooses otherwise. ``clean`` and ``strict`` are relative to the
    fingerprints that the run carries; a checkpoint without its run has none, and no such figures.

    Raises:
        ConfigError: neither run nor checkpoint, or no source.
        DataError: nothing readable or labelled, or a class that the run does not know.
        CheckpointError: the checkpoint is missing or is not one.
    """
    checkpoint_folder, run_folder = _find_checkpoint(config)
    if config.source is None:
        raise ConfigError("evaluation needs --set source=DIR")
    checkpoint = load_checkpoint(checkpoint_folder)
    info = read_run_info(run_folder) if run_folder.exists(layout.RUN) else {}
    seen = run_folder.read_table(layout.SEEN) if run_folder.exists(layout.SEEN) else None
    # A store may have been made with other preprocessing than the run's config file said.
    preprocess = PreprocessConfig.model_validate(
        info.get("preprocess", checkpoint.config.preprocess.model_dump())
    )
    files = _files_to_score(config, checkpoint.classes, only_paths)
    log(f"evaluating {checkpoint_folder} (epoch {checkpoint.epoch}) on {len(files)} files")
    rows = _predict_files(files, config, checkpoint_folder, preprocess, log)
    rejected = rows.filter(pc.is_valid(rows["reason"])).select(REJECTED.names).cast(REJECTED)
    accepted = rows.filter(pc.is_null(rows["reason"]))
    if accepted.num_rows == 0:
        reasons = Counter(rejected["reason"].to_pylist()).most_common(3)
        commonest = ", ".join(f"{reason} ({count})" for reason, count in reasons)
        raise DataError(f"none of the {len(files)} files in {config.source} is usable: {commonest}")
    predictions = accepted.select(PREDICTIONS.names).cast(PREDICTIONS)
    if seen is not None:
        exposed = exposure(Fingerprints.of(accepted), Fingerprints.of(seen), preprocess)
        for name, flags in (("clean", exposed.clean), ("strict", exposed.strict)):
            position = PREDICTIONS.get_field_index(name)
            predictions = predictions.set_column(position, name, pa.array(flags, pa.bool_()))
    metrics = summarise(
        predictions,
        seen,
        checkpoint.classes,
        checkpoint.clusters.class_of_cluster.numpy(),
        num_resamples=config.evaluation.bootstrap_resamples,
        seed=config.seed,
    )
    metrics |= {"num_rejected": float(rejected.num_rows), "epoch": float(checkpoint.epoch)}
    folder = Folder(config.storage) / layout.EVALUATIONS / _name(config)
    folder.write_table(layout.PREDICTIONS, predictions)
    folder.write_table(layout.REJECTED, rejected)
    folder.write_json(layout.EVALUATION_METRICS, metrics)
    draw_evaluation_figures(folder, predictions, checkpoint.classes)
    return Evaluation(folder, metrics, checkpoint.classes)


def _find_checkpoint(config: Config) -> tuple[Folder, Folder]:
    """(folder of model.pt, folder of the run whose fingerprints belong to it)."""
    if (config.run is None) == (config.checkpoint is None):
        raise ConfigError("evaluation needs one of --set run=NAME and --set checkpoint=PATH")
    if config.run is not None:
        run = open_run(Folder(config.storage), config.run)
        return run.folder / layout.BEST, run.folder
    folder = Folder(str(config.checkpoint).removesuffix(f"/{layout.MODEL}"))
    return folder, Folder(folder.uri.rpartition("/")[0] or "/")


def _files_to_score(
    config: Config, classes: list[str], only_paths: set[str] | None
) -> list[SourceFile]:
    labels = None if config.labels is None else Folder(config.labels)
    files = list_source(Folder(str(config.source)), labels, config.classes.map).files
    if only_paths is not None:
        files = [file for file in files if file.path in only_paths]
    elif any(file.split == TEST for file in files):
        files = [file for file in files if file.split == TEST]
    labelled = [file for file in files if file.label is not None]
    if not labelled:
        raise DataError(
            f"source={config.source} names no class of any slice: evaluation needs class folders "
            "or a labels table"
        )
    unknown = sorted({file.label for file in labelled if file.label} - set(classes))
    if unknown:
        raise DataError(
            f"class {unknown[0]!r} of {config.source} is none of the run's "
            f"({', '.join(classes)}): rename with --set classes.map.{unknown[0]}=NAME"
        )
    return labelled


def _name(config: Config) -> str:
    if config.name is not None:
        return config.name
    of = config.run or PurePosixPath(str(config.checkpoint).rstrip("/")).parent.name
    return f"{of}-on-{PurePosixPath(str(config.source).rstrip('/')).name}"


def _predict_files(
    files: list[SourceFile],
    config: Config,
    checkpoint_folder: Folder,
    preprocess: PreprocessConfig,
    log: Log,
) -> pa.Table:
    """One row per file, in the order of paths: PREDICTIONS columns, or reason and detail."""
    source = Folder(str(config.source))
    salt = subject_salt(Folder(config.storage))
    tables = [
        pa.table(
            {
                "number": range(start, min(start + _FILES_PER_TASK, len(files))),
            }
        )
        for start in range(0, len(files), _FILES_PER_TASK)
    ]
    all_files = ray.put(files)

    def decode(batch: pa.Table) -> pa.Table:
        rows = []
        for number in batch["number"].to_pylist():
            asked = ray.get(all_files)[number]
            for row in _decode(asked.file, source, preprocess, salt):
                subject = asked.subject or row.get("header_subject")
                about = {"label": asked.label, "subject_id": subject}
                about["subject_source"] = None if subject is None else GIVEN
                rows.append(dict.fromkeys(_DECODED.names) | row | about)
        return pa.Table.from_pylist(rows, schema=_DECODED)

    num_gpus = 1 if config.train.device != "cpu" and ray.cluster_resources().get("GPU") else 0
    predicted = (
        ray.data.from_arrow(tables)
        .map_batches(decode, batch_size=None, batch_format="pyarrow")
        .map_batches(
            _Predictor,
            fn_constructor_kwargs={"folder": checkpoint_folder},
            compute=ray.data.ActorPoolStrategy(size=1),
            num_gpus=num_gpus,
            batch_size=None,
            batch_format="pyarrow",
        )
    )
    batches = list(with_progress(predicted, len(files), "predicted", log))
    return pa.concat_tables(batches).sort_by([("path", "ascending"), ("frame", "ascending")])


_DECODED = pa.schema(
    [
        ("label", pa.string()),
        ("subject_id", pa.string()),
        ("subject_source", pa.string()),
        *(SLICES.field(name) for name in SLICES.names),
    ]
)
"""Of a decoded slice."""

_CARRIED = ["subject_id", "subject_source", "sha256", "num_bytes", "reason", "detail"]
"""Columns that a prediction's row keeps beside its own."""


def _decode(
    file: FoundFile, source: Folder, preprocess: PreprocessConfig, salt: bytes
) -> list[dict[str, Any]]:
    content = None
    try:
        content = read_file(source, file)
        return preprocess_file(content, file, preprocess, salt)
    except RejectedImage as rejection:
        return [rejected_row(file, content, rejection)]


class _Predictor:
    """Holds the checkpoint on one actor's device; the config that it was trained with rules."""

    def __init__(self, folder: Folder) -> None:
        self.checkpoint: Checkpoint = load_checkpoint(folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = self.checkpoint.encoder.to(self.device).to(memory_format=torch.channels_last)
        self.clusters = self.checkpoint.clusters.to(self.device)
        self.precision = resolve_precision(self.checkpoint.config.train.precision, self.device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        accepted = pc.is_null(batch["reason"])
        good = batch.filter(accepted)
        output = self._predict(good)
        for name in _CARRIED:
            output = output.append_column(_DECODED.field(name), good[name])
        bad = batch.filter(pc.invert(accepted))
        empty = pa.table(
            {
                field.name: bad[field.name]
                if field.name in bad.column_names
                else pa.nulls(bad.num_rows, field.type)
                for field in output.schema
            },
            schema=output.schema,
        )
        return pa.concat_tables([output, empty])

    def _predict(self, rows: pa.Table) -> pa.Table:
        side = self.checkpoint.config.train.image_size
        images = np.empty((rows.num_rows, 1, side, side), dtype=np.uint8)
        for number, row in enumerate(rows.select(["image", "height", "width"]).to_pylist()):
            image = np.frombuffer(row["image"], dtype=np.uint8).reshape(row["height"], row["width"])
            images[number, 0] = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        output = embed(
            self.encoder,
            torch.from_numpy(images).to(self.device),
            scale=self.checkpoint.scale,
            batch_size=self.checkpoint.config.train.embed_batch_size,
            precision=self.precision,
        )
        index = {name: number for number, name in enumerate(self.checkpoint.classes)}
        labels = [index.get(name, UNLABELLED) for name in rows["label"].to_pylist()]
        predictions = gather_predictions(
            self.clusters,
            output.z,
            output.logits,
            torch.arange(rows.num_rows, device=self.device),
            torch.tensor(labels, dtype=torch.int64, device=self.device),
        )
        return predictions_table(
            predictions,
            self.checkpoint.classes,
            rows.select(["sample_id", "path", "frame", "thumbnail"]),
        )
