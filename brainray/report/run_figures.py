"""Figures of a run: curves over epochs, confusion matrices, embedding maps."""

from collections.abc import Sequence

from brainray import layout
from brainray.report.evaluation_figures import draw_evaluation_figures
from brainray.report.figures import (
    accuracy_curves,
    clustering_health,
    embedding_maps,
    loss_curves,
    timing_breakdown,
)
from brainray.report.maps import SliceMap
from brainray.report.style import png_bytes
from brainray.schema import History
from brainray.storage import Folder


def draw_run_figures(
    run: Folder, classes: list[str], chosen_epoch: int, maps: Sequence[SliceMap]
) -> None:
    """Write the figures of a run with a finished epoch; without test slices only curves.

    Args:
        run: folder with ``metrics.jsonl`` and ``predictions/epoch-XXXX.parquet``.
        classes: class names in the run's order.
        chosen_epoch: epoch of the confusion matrices, marked in the curves; 1-based.
        maps: t-SNE maps of the run's test slices (`maps.run_maps`).
    """
    _draw_curves(run, run.read_json_lines(layout.METRICS), chosen_epoch)
    if run.exists(layout.predictions_file(chosen_epoch)):
        predictions = run.read_table(layout.predictions_file(chosen_epoch))
        draw_evaluation_figures(run, predictions, classes)
    if maps:
        figure = embedding_maps(maps, classes, chosen_epoch)
        run.write_bytes(f"{layout.FIGURES}/tsne.png", png_bytes(figure))


def _draw_curves(run: Folder, history: History, chosen: int) -> None:
    figures = {
        f"{layout.FIGURES}/loss.png": loss_curves(history),
        f"{layout.FIGURES}/accuracy.png": accuracy_curves(history, chosen),
        f"{layout.FIGURES}/clustering_health.png": clustering_health(history, chosen),
        f"{layout.FIGURES}/timing.png": timing_breakdown(history),
    }
    for name, figure in figures.items():
        run.write_bytes(name, png_bytes(figure))
