"""Figures of an evaluation: confusion matrices of a table of predictions."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brainray import layout
from brainray.report.cells import PREDICTOR_TITLES
from brainray.report.figures import Confusion, confusion_counts, confusion_matrices
from brainray.report.style import png_bytes
from brainray.schema import CLASS_COLUMNS, has_class_support, subset_masks
from brainray.storage import Folder


def draw_evaluation_figures(folder: Folder, predictions: pa.Table, classes: list[str]) -> None:
    """Write ``figures/confusion_all.png`` and, if known, ``_clean`` and ``_strict``.

    ``_strict`` is left out if a class has too few strict slices, and all if no slice has a label.

    Args:
        folder: of the evaluation or the run.
        predictions: rows of the ``PREDICTIONS`` schema; unlabelled rows are ignored.
        classes: class names in the run's order.

    Raises:
        DataError: a label is not a class of the run.
    """
    labelled = predictions.filter(pc.is_valid(predictions["label"]))
    for subset, mask in subset_masks(labelled).items():
        rows = labelled.filter(pa.array(mask))
        if rows.num_rows and has_class_support(rows["label"].to_pylist(), subset):
            panels = [_confusion(rows, predictor, classes) for predictor in CLASS_COLUMNS]
            title = f"Confusion matrices, test slices: {subset} ({rows.num_rows:,})"
            figure = confusion_matrices(panels, classes, title)
            folder.write_bytes(f"{layout.FIGURES}/confusion_{subset}.png", png_bytes(figure))


def _confusion(rows: pa.Table, predictor: str, classes: list[str]) -> Confusion:
    labels = rows["label"].to_pylist()
    predicted = rows[CLASS_COLUMNS[predictor]].to_pylist()
    accuracy = np.mean([label == guess for label, guess in zip(labels, predicted, strict=True)])
    counts = confusion_counts(labels, predicted, classes)
    return Confusion(f"{PREDICTOR_TITLES[predictor]}: accuracy {accuracy:.3f}", counts)
