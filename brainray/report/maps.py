"""t-SNE maps of a run's test slices by epoch, for its figure and its report."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainray import layout
from brainray.config import EvaluationConfig
from brainray.report.tsne import MIN_SLICES, tsne_sequence
from brainray.storage import Folder

_SEED = 0
_COLUMNS = ["sample_id", "path", "frame", "label", "head", "cluster", "cluster_class"]
_COLUMNS += ["confidence", "embedding"]


@dataclass(frozen=True)
class SliceMap:
    """The t-SNE map of one epoch."""

    epoch: int
    points: NDArray[np.float32]  # (N, 2)
    rows: pa.Table  # (N) predictions after that epoch


def run_maps(run: Folder, evaluation: EvaluationConfig, chosen_epoch: int) -> list[SliceMap]:
    """Maps of the requested epochs and the chosen one, as far as their predictions were kept.

    All maps show the same slices, selected with `shown`.
    """
    tables = {
        epoch: run.read_table(layout.predictions_file(epoch), _COLUMNS)
        for epoch in sorted({*evaluation.tsne_epochs, chosen_epoch})
        if run.exists(layout.predictions_file(epoch))
    }
    if not tables:
        return []
    chosen_table = tables.get(chosen_epoch, next(iter(tables.values())))
    keys = _keys(shown(chosen_table, evaluation.tsne_max_slices))
    chosen = {}
    for epoch, table in tables.items():
        place = {key: row for row, key in enumerate(_keys(table))}
        chosen[epoch] = table.take([place[key] for key in keys])
    return map_sequence(chosen)


def map_sequence(tables: Mapping[int, pa.Table]) -> list[SliceMap]:
    """One map per epoch of the same slices; empty if there are too few slices."""
    if any(table.num_rows < MIN_SLICES for table in tables.values()):
        return []
    embeddings = [np.stack(table["embedding"].to_numpy()) for table in tables.values()]
    points = tsne_sequence(embeddings, _SEED)
    return [
        SliceMap(epoch, xy, table)
        for (epoch, table), xy in zip(tables.items(), points, strict=True)
    ]


def shown(table: pa.Table, limit: int) -> pa.Table:
    """At most ``limit`` rows, evenly spaced because rows may be ordered by class folder."""
    if table.num_rows <= limit:
        return table
    return table.take(np.linspace(0, table.num_rows - 1, limit).round().astype(np.int64))


def _keys(table: pa.Table) -> list[tuple[str, ...]]:
    """Unique keys: byte-identical copies in a test set share their sample_id but not the path."""
    columns = (table[name].to_pylist() for name in ("sample_id", "path", "frame"))
    return list(zip(*columns, strict=True))
