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
from brainray.mri.duplicates import (
    content_hash,
    has_near_duplicate,
    sample_id,
    thumbnail_matrix,
)
from brainray.orchestration.data import preprocess_file, read_file, with_progress
from brainray.orchestration.run import open_run
from brainray.orchestration.source import SourceFile, list_source
from brainray.report.evaluation_figures import draw_evaluation_figures
from brainray.schema import PREDICTIONS, REJECTED, TEST, UNLABELLED
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
    that is scored; ``only_paths`` chooses otherwise. ``clean`` is relative to the fingerprints
    that the run carries; a checkpoint without its run has none, and then no clean figures.

    Raises:
        ConfigError: neither run nor checkpoint, or no source.
        DataError: nothing readable or labelled, or a class that the run does not know.
        CheckpointError: the checkpoint is missing or is not one.
    """
    checkpoint_folder, run_folder = _find_checkpoint(config)
    if config.source is None:
        raise ConfigError("evaluation needs --set source=DIR")
    checkpoint = load_checkpoint(checkpoint_folder)
    info = run_folder.read_json(layout.RUN) if run_folder.exists(layout.RUN) else {}
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
        clean = ~has_near_duplicate(
            thumbnail_matrix(predictions["thumbnail"].to_pylist()),
            thumbnail_matrix(seen["thumbnail"].to_pylist()),
            threshold=preprocess.near_duplicate.thumbnail_correlation,
        )
        column = pa.array(clean, pa.bool_())
        predictions = predictions.set_column(PREDICTIONS.get_field_index("clean"), "clean", column)
    metrics = summarise(
        predictions,
        seen,
        checkpoint.classes,
        checkpoint.clusters.class_of_cluster.numpy(),
        num_resamples=config.evaluation.bootstrap_resamples,
        seed=config.seed,
    )
    metrics |= {"num_rejected": float(rejected.num_rows), "epoch": float(checkpoint.epoch)}
    folder = Folder(config.storage) / "evaluations" / _name(config)
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
    tables = [
        pa.table(
            {
                "path": [file.path for file in chunk],
                "label": pa.array([file.label for file in chunk], pa.string()),
            }
        )
        for chunk in (
            files[start : start + _FILES_PER_TASK]
            for start in range(0, len(files), _FILES_PER_TASK)
        )
    ]

    def decode(batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(
            [_decode(row, source, preprocess) for row in batch.to_pylist()], schema=_DECODED
        )

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
    return pa.concat_tables(batches).sort_by("path")


_DECODED = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.string()),
        ("sample_id", pa.string()),
        ("sha256", pa.string()),
        ("num_bytes", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("thumbnail", PREDICTIONS.field("thumbnail").type),
        ("image", pa.binary()),
    ]
)


def _decode(row: dict[str, Any], source: Folder, preprocess: PreprocessConfig) -> dict[str, Any]:
    decoded = dict.fromkeys(_DECODED.names) | row
    try:
        content = read_file(source, row["path"])
        digest = content_hash(content)
        decoded |= {
            "sha256": digest,
            "sample_id": sample_id(digest),
            "num_bytes": len(content),
        }
        found = preprocess_file(content, preprocess)
        decoded |= {name: found[name] for name in ("height", "width", "thumbnail", "image")}
    except RejectedImage as rejection:
        decoded |= {"reason": rejection.reason, "detail": rejection.detail}
    return decoded


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
        for name in ("sha256", "num_bytes", "reason", "detail"):
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
            sample_ids=rows["sample_id"].to_pylist(),
            paths=rows["path"].to_pylist(),
            thumbnails=rows["thumbnail"].to_pylist(),
            clean=None,
        )
