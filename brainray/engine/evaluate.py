"""Computes the reported metrics from predictions, for all, clean and strict test slices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainray import dist
from brainray.clustering.metrics import (
    accuracy_interval,
    classification_metrics,
    clustering_metrics,
    reweighted_accuracy,
    silhouette,
)
from brainray.engine.calibration import calibration_error, fit_temperature, temper
from brainray.engine.recluster import ClusterModel
from brainray.mri.duplicates import coarse, most_similar, thumbnail_matrix
from brainray.schema import LABELLED, MIN_STRICT_SUPPORT, PREDICTIONS, UNLABELLED, subset_masks

Metrics = dict[str, float]

MODEL_LOST = "train/model_lost"
"""1 for an epoch before a damaged checkpoint that had replaced the models of earlier epochs."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of a matching pair of encoder and mixture for N slices."""

    labels: NDArray[np.int64]  # (N,) UNLABELLED if unknown
    probabilities: NDArray[np.float32]  # (N, C) of the head
    responsibilities: NDArray[np.float32]  # (N, K) of the mixture
    class_of_cluster: NDArray[np.int64]  # (K,)
    log_likelihood: NDArray[np.float32]  # (N,)
    embeddings: NDArray[np.float32]  # (N, E) L2-normalised

    @property
    def head(self) -> NDArray[np.int64]:
        """(N,) class predicted by the head."""
        return np.asarray(self.probabilities.argmax(axis=1))

    @property
    def clusters(self) -> NDArray[np.int64]:
        """(N,) most likely component."""
        return np.asarray(self.responsibilities.argmax(axis=1))

    @property
    def cluster_classes(self) -> NDArray[np.int64]:
        """(N,) class of the most likely component; independent of the head."""
        return np.asarray(self.class_of_cluster[self.clusters])

    @property
    def by_predictor(self) -> dict[str, NDArray[np.int64]]:
        """(N,) classes by predictor, of which the model has two."""
        return {"head": self.head, "cluster": self.cluster_classes}

    def select(self, mask: NDArray[np.bool_]) -> "Predictions":
        """The slices for which the mask (N,) is true."""
        return Predictions(
            self.labels[mask],
            self.probabilities[mask],
            self.responsibilities[mask],
            self.class_of_cluster,
            self.log_likelihood[mask],
            self.embeddings[mask],
        )


def gather_predictions(
    clusters: ClusterModel, z: Tensor, logits: Tensor, keys: Tensor, labels: Tensor
) -> Predictions:
    """Predictions for the slices of all ranks, ordered by key, the same on every rank (collective).

    Args:
        clusters: mixture fitted on embeddings of the same encoder.
        z: (n, E) this rank's embeddings.
        logits: (n, C).
        keys: (n,) int64.
        labels: (n,) int64.
    """
    order = torch.argsort(dist.gather_rows(keys))

    def gather(rows: Tensor) -> NDArray[np.float32]:
        return np.asarray(dist.gather_rows(rows.contiguous())[order].float().cpu().numpy())

    return Predictions(
        labels=dist.gather_rows(labels)[order].cpu().numpy(),
        probabilities=gather(logits.softmax(dim=1)),
        responsibilities=gather(clusters.responsibilities(z)),
        class_of_cluster=clusters.class_of_cluster.cpu().numpy(),
        log_likelihood=gather(clusters.log_likelihood(z)[:, None])[:, 0],
        embeddings=gather(z),
    )


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


def validation_metrics(predictions: Predictions) -> Metrics:
    """Validation metrics, among them ``validation/score``, which `chosen_epoch` uses.

    The score is the balanced accuracy of the head. Ties are broken by the lower cross entropy,
    whose weight is too small to outweigh a slice.
    """
    labels = predictions.labels
    num_of_class = np.unique(labels, return_counts=True)[1]
    num_right = np.array([(predictions.head[labels == c] == c).sum() for c in np.unique(labels)])
    likelihood = predictions.probabilities[np.arange(len(labels)), labels]
    loss = float(-np.log(np.clip(likelihood, 1e-12, None)).mean())
    balanced = float(np.mean(num_right / num_of_class))
    return {
        "validation/head/accuracy": float((predictions.head == labels).mean()),
        "validation/head/balanced_accuracy": balanced,
        "validation/cluster/accuracy": float((predictions.cluster_classes == labels).mean()),
        "validation/loss": loss,
        "validation/calibration_error": calibration_error(predictions.probabilities, labels),
        "validation/temperature": fit_temperature(predictions.probabilities, labels),
        "validation/num_slices": float(len(labels)),
        "validation/score": balanced - 1e-6 * loss,
        "validation/score_error": _standard_error(num_right, num_of_class),
    }


def _standard_error(num_right: NDArray[np.int64], num_of_class: NDArray[np.int64]) -> float:
    """Standard error of a balanced accuracy (mean recall over classes) from counts (C,).

    Four pseudo-slices, half of them right, are spread over the classes (Agresti & Coull 1998), so
    that the error is above 0 even if no prediction is wrong.
    """
    num_classes = len(num_of_class)
    counts = num_of_class + 4 / num_classes
    recalls = (num_right + 2 / num_classes) / counts
    return float(np.sqrt((recalls * (1 - recalls) / counts).sum()) / num_classes)


def chosen_epoch(history: Sequence[Metrics]) -> int:
    """The last epoch within one standard error of the best score; 1-based.

    The one-standard-error rule is that of Breiman et al. 1984 ("Classification and Regression
    Trees", section 3.4.3): such scores cannot be distinguished with that number of slices, and the
    last of these epochs was trained at the lowest learning rate. If slices grow during training,
    only epochs with the largest slices count, since the run predicts at that size. As epochs are
    added, the choice either stays or moves to the newest epoch, so no other needs to be kept. If
    the model of the chosen epoch is lost nevertheless, the choice is among those that are not.

    Args:
        history: for each epoch, `validation_metrics`, ``train/image_size`` and, if its model is
            lost, `MODEL_LOST`.
    """
    epochs = dict(enumerate(history, start=1))
    chosen = _last_of_the_best(epochs)
    left = {epoch: metrics for epoch, metrics in epochs.items() if not metrics.get(MODEL_LOST)}
    return _last_of_the_best(left) if left and chosen not in left else chosen


def _last_of_the_best(epochs: Mapping[int, Metrics]) -> int:
    side = "train/image_size"
    largest = max(metrics[side] for metrics in epochs.values())
    scores = {
        epoch: metrics["validation/score"]
        for epoch, metrics in epochs.items()
        if metrics[side] == largest
    }
    best = max(scores, key=lambda epoch: scores[epoch])
    least = scores[best] - epochs[best]["validation/score_error"]
    return max(epoch for epoch, score in scores.items() if score >= least)


def predictions_table(
    predictions: Predictions, classes: Sequence[str], slices: pa.Table
) -> pa.Table:
    """Rows of the ``PREDICTIONS`` schema.

    ``slices``, in the order of the predictions, has the identity and thumbnail of each slice, and
    ``clean`` and ``strict`` if known.
    """
    names = np.array(list(classes), dtype=object)
    labels = [
        None if label == UNLABELLED else str(names[label]) for label in predictions.labels.tolist()
    ]
    columns = {
        **{
            name: slices[name].to_pylist()
            if name in slices.column_names
            else [None] * slices.num_rows
            for name in ("sample_id", "path", "frame", "clean", "strict", "thumbnail")
        },
        "label": labels,
        "head": names[predictions.head].tolist(),
        "cluster_class": names[predictions.cluster_classes].tolist(),
        "cluster": predictions.clusters.astype(np.int32),
        "confidence": predictions.probabilities.max(axis=1),
        "probabilities": list(predictions.probabilities),
        "responsibilities": list(predictions.responsibilities),
        "log_likelihood": predictions.log_likelihood,
        "embedding": list(predictions.embeddings),
    }
    return pa.table(
        [pa.array(columns[field.name], field.type) for field in PREDICTIONS], schema=PREDICTIONS
    )


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
    predictions = _from_table(table, classes)
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
            reweighted = reweighted_accuracy(predictions.labels, predicted, mix / mix.sum())
            if reweighted is not None:
                metrics[f"test/all_as_clean/{name}/accuracy"] = reweighted
    return metrics


def labelled_rows(predictions: pa.Table) -> pa.Table:
    """The ``PREDICTIONS`` rows with a label."""
    return predictions.filter(pc.is_valid(predictions["label"]))


def resampling_groups(predictions: pa.Table, groups: Mapping[str, str]) -> NDArray[np.str_]:
    """(N,) group of each row, by its sample_id; a slice without a group is its own."""
    ids = predictions["sample_id"].to_pylist()
    return np.array([groups.get(identity, identity) for identity in ids], dtype=str)


def _from_table(table: pa.Table, classes: Sequence[str]) -> Predictions:
    """Predictions of a table whose rows are labelled."""
    responsibilities = matrix_of(table["responsibilities"])
    class_of_cluster = np.zeros(responsibilities.shape[1], np.int64)  # no matter for an empty one
    class_of_cluster[table["cluster"].to_numpy()] = _indices(table["cluster_class"], classes)
    return Predictions(
        labels=_indices(table["label"], classes),
        probabilities=matrix_of(table["probabilities"]),
        responsibilities=responsibilities,
        class_of_cluster=class_of_cluster,
        log_likelihood=np.asarray(table["log_likelihood"].to_numpy()),
        embeddings=matrix_of(table["embedding"]),
    )


def _indices(names: pa.ChunkedArray, classes: Sequence[str]) -> NDArray[np.int64]:
    """(N,) positions of class names."""
    index = {name: position for position, name in enumerate(classes)}
    return np.array([index[name] for name in names.to_pylist()], dtype=np.int64)


def matrix_of(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """(N, D) float32 matrix of a column of lists of equal length."""
    # Chunk by chunk, as an array of lists may have no more than 2^31 numbers.
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(values, dtype=np.float32).reshape(len(column), -1)


def _nearest_thumbnail(
    table: pa.Table, seen: pa.Table, classes: Sequence[str]
) -> NDArray[np.int64]:
    """(N,) class of the most similar labelled training thumbnail."""
    labelled = seen.filter(pc.equal(seen["role"], LABELLED))
    labels = _indices(labelled["label"], classes)
    _, nearest = most_similar(
        coarse(thumbnail_matrix(table["thumbnail"].to_pylist())),
        coarse(thumbnail_matrix(labelled["thumbnail"].to_pylist())),
    )
    return labels[nearest]
