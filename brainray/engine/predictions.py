"""Predictions of slices: gathered from all ranks, to and from their table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainray import dist
from brainray.engine.recluster import ClusterModel
from brainray.models.encoder import EncoderOutput
from brainray.schema import PREDICTIONS, UNLABELLED, matrix_of


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
    clusters: ClusterModel, output: EncoderOutput, keys: Tensor, labels: Tensor
) -> Predictions:
    """Predictions for the slices of all ranks, ordered by key, the same on every rank (collective).

    Args:
        clusters: mixture fitted on embeddings of the same encoder.
        output: of the encoder for this rank's n slices.
        keys: (n,) int64.
        labels: (n,) int64.
    """
    order = torch.argsort(dist.gather_rows(keys))

    def gather(rows: Tensor) -> NDArray[np.float32]:
        return np.asarray(dist.gather_rows(rows.contiguous())[order].float().cpu().numpy())

    return Predictions(
        labels=dist.gather_rows(labels)[order].cpu().numpy(),
        probabilities=gather(output.logits.softmax(dim=1)),
        responsibilities=gather(clusters.responsibilities(output.z)),
        class_of_cluster=clusters.class_of_cluster.cpu().numpy(),
        log_likelihood=gather(clusters.log_likelihood(output.z)[:, None])[:, 0],
        embeddings=gather(output.z),
    )


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


def predictions_from_table(table: pa.Table, classes: Sequence[str]) -> Predictions:
    """Predictions of a table whose rows are labelled."""
    responsibilities = matrix_of(table["responsibilities"])
    # Clusters without slices keep class 0, which is not read.
    class_of_cluster = np.zeros(responsibilities.shape[1], np.int64)
    class_of_cluster[table["cluster"].to_numpy()] = class_indices(table["cluster_class"], classes)
    return Predictions(
        labels=class_indices(table["label"], classes),
        probabilities=matrix_of(table["probabilities"]),
        responsibilities=responsibilities,
        class_of_cluster=class_of_cluster,
        log_likelihood=np.asarray(table["log_likelihood"].to_numpy()),
        embeddings=matrix_of(table["embedding"]),
    )


def class_indices(names: pa.ChunkedArray, classes: Sequence[str]) -> NDArray[np.int64]:
    """(N,) positions of class names."""
    index = {name: position for position, name in enumerate(classes)}
    return np.array([index[name] for name in names.to_pylist()], dtype=np.int64)
