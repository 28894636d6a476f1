"""Prediction on raw files: Ray Data decodes, actors embed; what evaluation and prediction share."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from brainray.engine.evaluate import gather_predictions, predictions_table
from brainray.engine.recipe import resolve_precision
from brainray.engine.shard import CachedImages
from brainray.engine.state import Checkpoint, load_checkpoint
from brainray.errors import ConfigError
from brainray.mri.decode import RejectedImage
from brainray.orchestration.preparation import (
    SLICES,
    preprocess_file,
    read_file,
    rejected_row,
    subject_salt,
)
from brainray.orchestration.run import open_run, read_run_info
from brainray.orchestration.source import FoundFile, SourceFile
from brainray.schema import FITTED, GIVEN, UNLABELLED
from brainray.storage import Folder

_FILES_PER_TASK = 128
_VOLUMES_PER_TASK = 4  # a volume has hundreds of slices
_VOLUME_SUFFIXES = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Predictor:
    """A checkpoint that predicts, and what its run knows."""

    folder: Folder  # of model.pt
    run_folder: Folder  # of the run whose records belong to it; may hold none
    checkpoint: Checkpoint
    preprocess: PreprocessConfig

    def fitted(self) -> pa.Table | None:
        """``FITTED`` rows of the slices that the mixture was fitted on, where they were kept."""
        if not self.folder.exists(layout.FITTED):
            return None
        return self.folder.read_table(layout.FITTED)

    def seen(self) -> pa.Table | None:
        """Fingerprints of what the run saw; None for a checkpoint without its run."""
        if not self.run_folder.exists(layout.SEEN):
            return None
        return self.run_folder.read_table(layout.SEEN)


def find_predictor(config: Config, purpose: str) -> Predictor:
    """The chosen epoch of ``config.run``, or the checkpoint ``config.checkpoint``.

    Raises:
        ConfigError: neither of them, or both.
        DataError: no such run.
        CheckpointError: the checkpoint is missing or is not one.
    """
    if (config.run is None) == (config.checkpoint is None):
        raise ConfigError(f"{purpose} needs one of --set run=NAME and --set checkpoint=PATH")
    if config.run is not None:
        run_folder = open_run(Folder(config.storage), config.run).folder
        folder = run_folder / layout.BEST
    else:
        folder = Folder(str(config.checkpoint).removesuffix(f"/{layout.MODEL}"))
        run_folder = Folder(folder.uri.rpartition("/")[0] or "/")
    checkpoint = load_checkpoint(folder)
    info = read_run_info(run_folder) if run_folder.exists(layout.RUN) else {}
    # A store may have been made with other preprocessing than the run's config file said.
    preprocess = PreprocessConfig.model_validate(
        info.get("preprocess", checkpoint.config.preprocess.model_dump())
    )
    return Predictor(folder, run_folder, checkpoint, preprocess)


def predicted_blocks(
    files: Sequence[SourceFile], config: Config, predictor: Predictor
) -> ray.data.Dataset:
    """Blocks as they come, with the columns of ``PREDICTIONS`` and what `REJECTED` needs: a row for
    each slice, or one with the reason for a file that cannot be read, all of a file in one block.
    """
    source = Folder(str(config.source))
    salt = subject_salt(Folder(config.storage))
    all_files = ray.put(list(files))
    preprocess = predictor.preprocess

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

    with _whole_blocks():
        tasks = ray.data.from_arrow([pa.table({"number": task}) for task in _tasks(files)])
    return tasks.map_batches(decode, batch_size=None, batch_format="pyarrow").map_batches(
        _Embedder,
        fn_constructor_kwargs={"folder": predictor.folder},
        batch_size=None,
        batch_format="pyarrow",
        **_actors(config),
    )


@contextmanager
def _whole_blocks() -> Iterator[None]:
    """Data sets made within keep the blocks that their functions return: a block that is split
    would part the slices of a volume.
    """
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size
    context.target_max_block_size = None
    try:
        yield
    finally:
        context.target_max_block_size = before


def _tasks(files: Sequence[SourceFile]) -> list[list[int]]:
    """Numbers of the files of each task."""
    volumes: list[int] = []
    images: list[int] = []
    for number, asked in enumerate(files):
        (volumes if asked.path.lower().endswith(_VOLUME_SUFFIXES) else images).append(number)
    return [
        numbers[start : start + size]
        for numbers, size in ((images, _FILES_PER_TASK), (volumes, _VOLUMES_PER_TASK))
        for start in range(0, len(numbers), size)
    ]


def _actors(config: Config) -> dict[str, Any]:
    """An actor on every GPU, or on every node without one, which leaves a CPU for decoding."""
    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0)) if config.train.device != "cpu" else 0
    if num_gpus:
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=num_gpus)
        return {"compute": pool, "num_gpus": 1}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = min(int(node.get("CPU", 1)) for node in nodes)
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=len(nodes))
    return {"compute": pool, "num_cpus": max(1, cpus - 1)}


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


class _Embedder:
    """Holds the checkpoint on one actor's device; the config that it was trained with rules."""

    def __init__(self, folder: Folder) -> None:
        self.checkpoint: Checkpoint = load_checkpoint(folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)  # decoding needs little of them
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
            CachedImages(torch.from_numpy(images).to(self.device)),
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
        table = predictions_table(
            predictions,
            self.checkpoint.classes,
            rows.select(["sample_id", "path", "frame", "thumbnail"]),
        )
        coordinates = list(self.clusters.coordinates(output.z).cpu().numpy())
        field = FITTED.field("coordinates")
        return table.append_column(field, pa.array(coordinates, field.type))
