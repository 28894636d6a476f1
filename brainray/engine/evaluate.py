"""Computes the reported metrics from predictions, for all, clean and strict test slices."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainray.clustering.metrics import clustering_metrics, silhouette
from brainray.engine.accuracy import (
    accuracy_interval,
    classification_metrics,
    reweighted_accuracy,
)
from brainray.engine.calibration import calibration_error, temper
from brainray.engine.predictions import Predictions, class_indices, predictions_from_table
from brainray.mri.thumbnails import coarse, most_similar, thumbnail_matrix
from brainray.schema import (
    LABELLED,
    MIN_STRICT_SUPPORT,
    UNLABELLED,
    Metrics,
    has_class_support,
    subset_masks,
)

_MAX_CONFUSED = 20  # classes: with more, the confusion matrix is not logged every epoch


def epoch_metrics(test: Predictions, slices: pa.Table, classes: Sequence[str]) -> Metrics:
    """Metrics of the test slices after an epoch, for all, clean and strict ones.

    Args:
        test: predictions, of at least one slice.
        slices: rows in the order of the predictions, with ``clean`` and ``strict``.
        classes: C class names in the run's order.
    """
    metrics: Metrics = {}
    for subset, mask in subset_masks(slices).items():
        chosen = test.select(mask)
        metrics |= subset_metrics(chosen, classes, subset)
        if len(classes) <= _MAX_CONFUSED and has_class_support(chosen.labels.tolist(), subset):
            metrics |= confusion_metrics(chosen, classes, f"test/{subset}")
    return metrics | _clean_clusters(metrics)


def _clean_clusters(metrics: Metrics) -> Metrics:
    """The clusters' metrics on clean slices under their short names, such as ``cluster/nmi``."""
    names = (f"cluster/{name}" for name in ("silhouette", "nmi", "ari", "fmi"))
    return {
        name: metrics[f"test/clean/{name}"] for name in names if f"test/clean/{name}" in metrics
    }


def subset_metrics(predictions: Predictions, classes: Sequence[str], subset: str) -> Metrics:
    """Flat metrics of one subset, such as ``test/all/head/accuracy``; left out if undefined.

    Unlabelled slices are ignored.
    """
    scored = predictions.select(predictions.labels != UNLABELLED)
    prefix = f"test/{subset}"
    metrics: Metrics = {f"{prefix}/num_slices": float(len(scored.labels))}
    if len(scored.labels) == 0:
        return metrics
    for predictor, predicted in scored.by_predictor.items():
        metrics |= _accuracy_metrics(scored.labels, predicted, classes, subset, predictor)
    if len(np.unique(scored.labels)) > 1:  # agreement is undefined with one class
        for name, value in clustering_metrics(scored.labels, scored.clusters).items():
            metrics[f"{prefix}/cluster/{name}"] = value
    separation = silhouette(scored.embeddings, scored.clusters)
    if separation is not None:
        metrics[f"{prefix}/cluster/silhouette"] = separation
    return metrics


def _accuracy_metrics(
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    classes: Sequence[str],
    subset: str,
    predictor: str,
) -> Metrics:
    min_support = MIN_STRICT_SUPPORT if subset == "strict" else 1
    metrics = classification_metrics(labels, predicted, classes, min_support)
    return {f"test/{subset}/{predictor}/{name}": value for name, value in metrics.items()}


def confusion_metrics(predictions: Predictions, classes: Sequence[str], prefix: str) -> Metrics:
    """Confusion matrices as flat counts named ``PREFIX/head/confusion/LABEL/PREDICTION``."""
    scored = predictions.select(predictions.labels != UNLABELLED)
    metrics: Metrics = {}
    for predictor, predicted in scored.by_predictor.items():
        counts = np.zeros((len(classes), len(classes)))
        np.add.at(counts, (scored.labels, predicted), 1)
        for row, label in enumerate(classes):
            for column, prediction in enumerate(classes):
                name = f"{prefix}/{predictor}/confusion/{label}/{prediction}"
                metrics[name] = float(counts[row, column])
    return metrics


def summarise(
    table: pa.Table,
    seen: pa.Table | None,
    classes: Sequence[str],
    *,
    num_resamples: int,
    seed: int,
    groups: Mapping[str, str] | None = None,
    temperature: float | None = None,
) -> Metrics:
    """The reported metrics of a table of predictions.

    For ``all``, ``clean`` and ``strict``: metrics of both predictors and of the memory baseline
    (nearest labelled thumbnail, ``thumbnail_1nn``), with bootstrap intervals of the accuracies. In
    addition ``all_as_clean``: accuracies over all slices, re-weighted to the class mix of clean.

    Args:
        table: ``PREDICTIONS`` rows; those without a label are left out.
        seen: ``SEEN`` rows with the fingerprints of the slices that the run saw; without them, only
            ``all`` is reported, without the baseline.
        classes: C class names in the run's order.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
        groups: by sample_id, what is resampled as a whole, such as a subject; a slice without a
            group is its own.
        temperature: fitted on validation; the calibration error of the head is also given after
            scaling with it.
    """
    table = labelled_rows(table)
    if table.num_rows == 0:
        return {"test/all/num_slices": 0.0}
    predictions = predictions_from_table(table, classes)
    by_predictor = predictions.by_predictor
    if seen is not None:
        by_predictor["thumbnail_1nn"] = _nearest_thumbnail(table, seen, classes)
    subsets = subset_masks(table)
    group_of = resampling_groups(table, groups or {})
    metrics: Metrics = {}
    for subset, mask in subsets.items():
        chosen = predictions.select(mask)
        metrics |= subset_metrics(chosen, classes, subset)
        if len(chosen.labels) == 0:
            continue
        prefix = f"test/{subset}/head/calibration_error"
        metrics[prefix] = calibration_error(chosen.probabilities, chosen.labels)
        if temperature is not None:
            tempered = temper(chosen.probabilities, temperature)
            metrics[f"{prefix}_tempered"] = calibration_error(tempered, chosen.labels)
        for name, predicted in by_predictor.items():
            if name not in chosen.by_predictor:  # the others are in subset_metrics
                metrics |= _accuracy_metrics(chosen.labels, predicted[mask], classes, subset, name)
            is_right = predicted[mask] == chosen.labels
            interval = accuracy_interval(is_right, group_of[mask], seed, num_resamples)
            if interval is not None:
                low, high = interval
                metrics[f"test/{subset}/{name}/accuracy_low"] = low
                metrics[f"test/{subset}/{name}/accuracy_high"] = high
    if "clean" in subsets and subsets["clean"].any():
        mix = np.bincount(predictions.labels[subsets["clean"]], minlength=len(classes))
        for name, predicted in by_predictor.items():
            metrics[f"test/all_as_clean/{name}/accuracy"] = reweighted_accuracy(
                predictions.labels, predicted, mix
            )
    return metrics | _clean_clusters(metrics)


def labelled_rows(predictions: pa.Table) -> pa.Table:
    """The ``PREDICTIONS`` rows with a label."""
    return predictions.filter(pc.is_valid(predictions["label"]))


def resampling_groups(predictions: pa.Table, groups: Mapping[str, str]) -> NDArray[np.str_]:
    """(N,) group of each row, by its sample_id; a slice without a group is its own."""
    ids = predictions["sample_id"].to_pylist()
    return np.array([groups.get(identity, identity) for identity in ids], dtype=str)


def _nearest_thumbnail(
    table: pa.Table, seen: pa.Table, classes: Sequence[str]
) -> NDArray[np.int64]:
    """(N,) class of the most similar labelled training thumbnail."""
    labelled = seen.filter(pc.equal(seen["role"], LABELLED))
    labels = class_indices(labelled["label"], classes)
    _, nearest = most_similar(
        coarse(thumbnail_matrix(table["thumbnail"].to_pylist())),
        coarse(thumbnail_matrix(labelled["thumbnail"].to_pylist())),
    )
    return labels[nearest]
