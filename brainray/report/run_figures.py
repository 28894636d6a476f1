"""Figures of a run: curves over its epochs, confusion matrices, maps of its embeddings."""

import numpy as np
import pyarrow as pa

from brainray import layout
from brainray.config import EvaluationConfig
from brainray.report.evaluation_figures import draw_evaluation_figures
from brainray.report.figures import (
    UNLABELLED_CLASS,
    EmbeddingMap,
    accuracy_curves,
    clustering_health,
    embedding_maps,
    loss_curves,
    timing_breakdown,
)
from brainray.report.history import History
from brainray.report.style import png_bytes
from brainray.report.tsne import MIN_SLICES, tsne_sequence
from brainray.storage import Folder

_SEED = 0
_MAP_COLUMNS = ["sample_id", "path", "label", "cluster", "embedding"]


def draw_run_figures(
    run: Folder, classes: list[str], evaluation: EvaluationConfig, chosen_epoch: int
) -> list[str]:
    """Write the figures that the run's logs and predictions allow.

    Args:
        run: folder with ``metrics.jsonl`` and ``predictions/epoch-XXXX.parquet``.
        classes: of the run, in its order.
        evaluation: which epochs are mapped, and with how many slices.
        chosen_epoch: whose confusion matrices are drawn, and which the curves mark; 1-based.

    Returns:
        Names of the files in the folder, such as ``figures/loss.png``. Without test slices there
        are curves alone, without a finished epoch there is nothing.
    """
    history = run.read_json_lines(layout.METRICS)
    if not history:
        return []
    names = _draw_curves(run, history, chosen_epoch)
    if run.exists(layout.predictions_file(chosen_epoch)):
        predictions = run.read_table(layout.predictions_file(chosen_epoch))
        names += draw_evaluation_figures(run, predictions, classes)
    return names + _draw_maps(run, classes, evaluation, chosen_epoch)


def _draw_curves(run: Folder, history: History, chosen: int) -> list[str]:
    figures = {
        "figures/loss.png": loss_curves(history),
        "figures/accuracy.png": accuracy_curves(history, chosen),
        "figures/clustering_health.png": clustering_health(history, chosen),
        "figures/timing.png": timing_breakdown(history),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        run.write_bytes(name, png_bytes(figure))
    return list(drawn)


def _draw_maps(
    run: Folder, classes: list[str], evaluation: EvaluationConfig, chosen_epoch: int
) -> list[str]:
    """Of the epochs asked for, and, where there are any, of the chosen one."""
    epochs = {*evaluation.tsne_epochs, chosen_epoch} if evaluation.tsne_epochs else set()
    tables = {
        epoch: run.read_table(layout.predictions_file(epoch), _MAP_COLUMNS)
        for epoch in sorted(epochs)
        if run.exists(layout.predictions_file(epoch))
    }
    if not tables:
        return []
    slices = choose_slices(next(iter(tables.values())), evaluation.tsne_max_slices, _SEED)
    if len(slices) < MIN_SLICES:
        return []
    chosen = [_rows_of(table, slices) for table in tables.values()]
    points = tsne_sequence([np.stack(rows["embedding"].to_numpy()) for rows in chosen], _SEED)
    maps = [
        EmbeddingMap(epoch, xy, rows["cluster"].to_numpy())
        for epoch, xy, rows in zip(tables, points, chosen, strict=True)
    ]
    labels = [label or UNLABELLED_CLASS for label in chosen[0]["label"].to_pylist()]
    run.write_bytes("figures/tsne.png", png_bytes(embedding_maps(maps, labels, classes)))
    return ["figures/tsne.png"]


def choose_slices(table: pa.Table, num_max: int, seed: int) -> list[tuple[str, str]]:
    """At most `num_max` slices in random order, as (sample_id, path), whatever the rows' order."""
    slices = sorted(_slices(table))
    order = np.random.default_rng(seed).permutation(len(slices))
    return [slices[i] for i in order[:num_max]]


def _rows_of(table: pa.Table, slices: list[tuple[str, str]]) -> pa.Table:
    row = {key: position for position, key in enumerate(_slices(table))}
    return table.take([row[key] for key in slices])


def _slices(table: pa.Table) -> list[tuple[str, str]]:
    """Test sets keep byte-identical copies, which share their sample_id: the path parts them."""
    return list(zip(table["sample_id"].to_pylist(), table["path"].to_pylist(), strict=True))
