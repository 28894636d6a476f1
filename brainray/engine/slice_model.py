"""Inference with a checkpoint: predictions, and their comparison with the training slices.

Prediction, evaluation and served models all use this module, so that their results agree up to the
precision (bf16 or fp32).
"""

import os
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from brainray.engine.epoch import embed
from brainray.engine.predictions import gather_predictions, predictions_table
from brainray.engine.recipe import resolve_precision
from brainray.engine.shard import CachedImages
from brainray.engine.state import Checkpoint
from brainray.mri.resize import stretch
from brainray.schema import FITTED, PREDICTED_SLICES, UNLABELLED, matrix_of

NUM_NEAREST = 5


class SliceModel:
    """A matching pair of encoder and mixture on one device."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | None = None, precision: str = "auto"
    ) -> None:
        """
        Args:
            checkpoint: the pair, with the config of its training.
            device: by default CUDA if available, else the CPU.
            precision: bf16 or fp32; ``auto`` resolves the run's setting on this device.
        """
        self.checkpoint = checkpoint
        if device is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device = device
        self.encoder = checkpoint.encoder.to(device).to(memory_format=torch.channels_last)
        self.clusters = checkpoint.clusters.to(device)
        requested = checkpoint.config.train.precision if precision == "auto" else precision
        self.precision = resolve_precision(requested, device)

    def predict(self, slices: pa.Table, carried: Sequence[str] = ()) -> pa.Table:
        """``PREDICTIONS`` rows with ``coordinates`` (``FITTED``), in the order of ``slices``.

        Rows with a ``reason``, for which there is no slice, come last and are otherwise null.
        ``slices`` has ``image``, ``height``, ``width``, ``label``, ``reason``, the columns that
        identify a slice, and the ``carried`` columns, which are copied to the output.
        """
        accepted = pc.is_null(slices["reason"])
        good, bad = slices.filter(accepted), slices.filter(pc.invert(accepted))
        output = self._predict(good)
        for name in carried:
            output = output.append_column(slices.schema.field(name), good[name])
        empty = [
            bad[field.name] if field.name in bad.column_names else pa.nulls(len(bad), field.type)
            for field in output.schema
        ]
        return pa.concat_tables([output, pa.table(empty, schema=output.schema)])

    def _predict(self, slices: pa.Table) -> pa.Table:
        train = self.checkpoint.config.train
        output = embed(
            self.encoder,
            CachedImages(torch.from_numpy(stored_pixels(slices, train.image_size)).to(self.device)),
            scale=self.checkpoint.scale,
            batch_size=train.embed_batch_size,
            precision=self.precision,
            side=self.checkpoint.image_size,  # smaller while slices still grow
        )
        index = {name: number for number, name in enumerate(self.checkpoint.classes)}
        labels = [index.get(name, UNLABELLED) for name in slices["label"].to_pylist()]
        predictions = gather_predictions(
            self.clusters,
            output,
            torch.arange(slices.num_rows, device=self.device),
            torch.tensor(labels, dtype=torch.int64, device=self.device),
        )
        table = predictions_table(
            predictions,
            self.checkpoint.classes,
            slices.select(["sample_id", "path", "frame", "thumbnail"]),
        )
        coordinates = list(self.clusters.coordinates(output.z).cpu().numpy())
        field = FITTED.field("coordinates")
        return table.append_column(field, pa.array(coordinates, field.type))


class Reference:
    """The training slices that new ones are compared with."""

    def __init__(self, fitted: pa.Table | None) -> None:
        """``fitted``: ``FITTED`` rows; None or empty if the checkpoint came without them."""
        self._index: Any = None
        if fitted is None or fitted.num_rows == 0:
            return
        coordinates = matrix_of(fitted["coordinates"])
        self._ids = np.array(fitted["sample_id"].to_pylist(), dtype=object)
        self._index = faiss.IndexFlatL2(coordinates.shape[1])
        self._index.add(coordinates)
        self._likelihoods = np.sort(np.asarray(fitted["log_likelihood"].to_numpy()))

    @property
    def is_empty(self) -> bool:
        """Whether there is no slice to compare with."""
        return self._index is None

    def rows(self, predictions: pa.Table) -> pa.Table:
        """``PREDICTED_SLICES`` rows from what `SliceModel.predict` gives with reason and detail."""
        columns: dict[str, Any] = {
            field.name: predictions[field.name]
            for field in PREDICTED_SLICES
            if field.name in predictions.column_names
        }
        columns["class"] = predictions["head"]
        columns |= self._compare(predictions)
        ordered = [columns[name] for name in PREDICTED_SLICES.names]
        return pa.table(ordered, names=PREDICTED_SLICES.names).cast(PREDICTED_SLICES)

    def _compare(self, predictions: pa.Table) -> dict[str, Any]:
        """Columns ``outlier_score``, ``nearest``, ``nearest_distance``; null if rejected."""
        result: dict[str, list[Any]] = {
            name: [None] * predictions.num_rows
            for name in ("outlier_score", "nearest", "nearest_distance")
        }
        found = predictions["coordinates"].is_valid().to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(found)
        if not self.is_empty and len(rows):
            chosen = predictions.take(pa.array(rows))
            known = self._likelihoods
            likelihood = np.asarray(chosen["log_likelihood"].to_numpy())
            scores = (len(known) - np.searchsorted(known, likelihood, "right")) / len(known)
            squared, nearest = self._index.search(
                matrix_of(chosen["coordinates"]), min(NUM_NEAREST, len(known))
            )
            distances = np.sqrt(np.maximum(squared, 0.0))
            for place, row in enumerate(rows.tolist()):
                result["outlier_score"][row] = float(scores[place])
                result["nearest"][row] = self._ids[nearest[place]].tolist()
                result["nearest_distance"][row] = distances[place].tolist()
        return {
            name: pa.array(found, PREDICTED_SLICES.field(name).type)
            for name, found in result.items()
        }


def stored_pixels(slices: pa.Table, side: int) -> NDArray[np.uint8]:
    """(n, 1, side, side) uint8 images of rows with ``image``, ``height`` and ``width``."""
    images = np.empty((slices.num_rows, 1, side, side), dtype=np.uint8)
    for number, row in enumerate(slices.select(["image", "height", "width"]).to_pylist()):
        image = np.frombuffer(row["image"], dtype=np.uint8).reshape(row["height"], row["width"])
        images[number, 0] = stretch(image, side)
    return images


def use_all_threads() -> None:
    """Let the encoder use all threads of this machine: decoding needs little of them."""
    torch.set_num_threads(os.cpu_count() or 1)
