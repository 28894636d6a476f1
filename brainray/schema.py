"""Column names, dtypes and shapes at every stage boundary."""

from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Metrics = dict[str, float]
"""Metrics by name, such as ``test/clean/head/accuracy``."""

History = list[Metrics]
"""Metrics of a training, one row per epoch or round of refinement, oldest first."""

SUBSETS = ("all", "clean", "strict")
"""Subsets of the test slices for which every metric is reported: all; ``clean``, without an
upright near-duplicate among the slices that the run saw; and ``strict``, those of them that also
have no mirrored or rotated copy and no slice likely of their subject among these."""

PREDICTORS = ("head", "cluster", "thumbnail_1nn")
"""Predictors of a test slice's class: linear classifier, mixture, nearest-thumbnail baseline."""

CLASS_COLUMNS = {"head": "head", "cluster": "cluster_class"}
"""Column of ``PREDICTIONS`` with each predictor's class."""

UNLABELLED = -1
"""Class index of a slice whose label is unknown or must not be read."""

NOISE = -1
"""Cluster of a slice that a clusterer assigned to no cluster."""

TRAIN, TEST = "train", "test"
"""Values of the ``split`` column."""

LABELLED, VALIDATION, UNLABELLED_ROLE = "labelled", "validation", "unlabelled"
"""Values of a training slice's ``role`` in one run."""

LEFT_OUT = "left_out"
"""Another ``role``: an unlabelled slice grouped with a validation slice, neither fitted nor scored.
"""

MIN_STRICT_SUPPORT = 30
"""Minimum number of strict slices of every class for which per-class metrics are reported."""

THUMBNAIL_SIDE = 96
"""Side of the thumbnails that serve as fingerprints, in pixels."""

TABLE, HEADER, STUDY, VOLUME, ESTIMATED = "table", "header", "study", "volume", "estimated"
"""Values of ``subject_source``: the patient is given by a labels table or by a DICOM header; the
slices are of one study or of one volume file without a patient; estimated by image similarity."""

NAMED = frozenset({TABLE, HEADER, STUDY, VOLUME})
"""Sources by which equal ids are certainly one subject. (Different studies or volumes may be, too.)
"""

IMAGE_STORE = pa.schema(
    [
        ("sample_id", pa.string()),  # 32 hex digits of the SHA-256 of the file's bytes (and frame)
        ("path", pa.string()),  # relative to the source, with forward slashes
        ("frame", pa.string()),  # in a file of several slices, as volume=0/axial=63; else empty
        ("format", pa.string()),  # JPEG, PNG, ...
        ("num_bytes", pa.int64()),
        ("original_height", pa.int32()),
        ("original_width", pa.int32()),
        ("split", pa.string()),  # train | test
        ("label", pa.string()),  # null where unknown
        ("duplicate_group_id", pa.string()),  # smallest sample_id of the near-duplicates
        ("subject_id", pa.string()),  # null where neither given nor estimated
        ("subject_source", pa.string()),  # table | header | study | volume | estimated
        ("draw_group_id", pa.string()),  # kept together by label draws: copies, given subjects
        ("kin_group_id", pa.string()),  # never in both labelled and validation slices
        ("split_group_id", pa.string()),  # kept together by drawn splits: also estimated subjects
        ("generation", pa.int32()),  # preprocessing run in which the slice first appeared
        ("skull_strip", pa.string()),  # method used: otsu also where intracranial was not confident
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("thumbnail", pa.binary(THUMBNAIL_SIDE * THUMBNAIL_SIDE)),  # uint8, row-major
        ("image", pa.binary()),  # uint8, row-major, height x width
    ]
)

IMAGE_INDEX_COLUMNS = [name for name in IMAGE_STORE.names if name not in {"image", "thumbnail"}]

REJECTED = pa.schema(
    [
        ("path", pa.string()),
        ("frame", pa.string()),  # empty where the whole file was rejected
        ("reason", pa.string()),  # a short fixed phrase, so that reasons can be counted
        ("detail", pa.string()),
        ("num_bytes", pa.int64()),
        ("sha256", pa.string()),  # null where the file could not be read
    ]
)

DUPLICATES = pa.schema(
    [
        ("path", pa.string()),
        ("frame", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("sample_id", pa.string()),
        ("level", pa.string()),  # exact: byte-identical to kept_path | near | turned
        (
            "kind",
            pa.string(),
        ),  # copy | mirrored | rotated; null if both were linked through turned copies
        ("duplicate_group_id", pa.string()),
        ("kept_path", pa.string()),  # the slice of the group that was kept or came first
        ("kept_frame", pa.string()),
        ("removed", pa.bool_()),  # exact copies in training, and slices dropped by split.mode=purge
    ]
)

SEEN = pa.schema(
    [
        ("sample_id", pa.string()),
        ("path", pa.string()),
        ("frame", pa.string()),
        ("role", pa.string()),  # labelled | validation | unlabelled | left_out
        ("label", pa.string()),  # null unless the run may read it
        ("duplicate_group_id", pa.string()),
        ("split_group_id", pa.string()),
        ("subject_id", pa.string()),
        ("subject_source", pa.string()),
        ("thumbnail", pa.binary(THUMBNAIL_SIDE * THUMBNAIL_SIDE)),
    ]
)
"""The slices that a run saw: its label draw and their fingerprints, kept with the run."""

PREDICTIONS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("path", pa.string()),
        ("frame", pa.string()),
        ("label", pa.string()),  # null where unknown
        ("clean", pa.bool_()),  # no upright near-duplicate among the slices that the run saw
        ("strict", pa.bool_()),  # nor a turned one, nor one likely of its subject; null if unknown
        ("head", pa.string()),  # class predicted by the linear head
        ("cluster_class", pa.string()),  # class of the most likely component
        ("cluster", pa.int32()),  # most likely component
        ("confidence", pa.float32()),  # highest probability of the head
        ("probabilities", pa.list_(pa.float32())),  # (C,), of the head
        ("responsibilities", pa.list_(pa.float32())),  # (K,), of the mixture
        ("log_likelihood", pa.float32()),  # of the embedding under the mixture; low = outlier
        ("embedding", pa.list_(pa.float32())),  # (E,), L2-normalised
        ("thumbnail", pa.binary(THUMBNAIL_SIDE * THUMBNAIL_SIDE)),
    ]
)
"""A model's predictions with all that scores, figures and reports need."""

FITTED = pa.schema(
    [
        ("sample_id", pa.string()),
        ("coordinates", pa.list_(pa.float32())),  # of the embedding, in the mixture's PCA space
        ("log_likelihood", pa.float32()),  # of the embedding under the mixture
    ]
)
"""The slices that a mixture was fitted on, with which new slices are compared."""

NEXT_LABELS = pa.schema(
    [
        ("rank", pa.int32()),  # from 1, the most useful
        ("path", pa.string()),  # relative to the source
        ("frame", pa.string()),
        ("label", pa.string()),  # empty, to be filled in
        ("sample_id", pa.string()),
        ("uncertainty", pa.float32()),  # from 0 to 1: one minus the lead of the best class
        ("class", pa.string()),  # most probable class, of the head
        ("confidence", pa.float32()),  # its probability
        ("cluster", pa.int32()),  # most likely component
        ("cluster_class", pa.string()),  # class to which this component is mapped
        ("duplicate_group_id", pa.string()),
        ("subject_id", pa.string()),
    ]
)
"""Slices that ``jobs/label.py`` proposes for labelling."""

PREDICTED_SLICES = pa.schema(
    [
        ("path", pa.string()),
        ("frame", pa.string()),
        ("sample_id", pa.string()),
        ("reason", pa.string()),  # why there is no prediction; null where there is one
        ("detail", pa.string()),
        ("class", pa.string()),  # most probable class, of the head
        ("confidence", pa.float32()),  # its probability
        ("probabilities", pa.list_(pa.float32())),  # (C,), of the head
        ("cluster", pa.int32()),  # most likely component
        ("cluster_class", pa.string()),  # class to which this component is mapped
        ("responsibilities", pa.list_(pa.float32())),  # (K,), of the mixture
        ("log_likelihood", pa.float32()),  # of the embedding under the mixture
        ("outlier_score", pa.float32()),  # share of training slices with a higher log_likelihood
        ("nearest", pa.list_(pa.string())),  # sample_ids of the most similar training slices
        ("nearest_distance", pa.list_(pa.float32())),  # their distances, in the mixture's PCA space
    ]
)
"""The prediction that users get for a slice, or for a file that cannot be read."""

PREDICTED_FILES = pa.schema(
    [*PREDICTED_SLICES, ("num_bytes", pa.int64()), ("mtime_ns", pa.int64())]
)
"""The same with a file's size and time of modification, to detect that it was replaced."""

FEATURES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("split", pa.string()),
        ("path", pa.string()),
        ("frame", pa.string()),
        ("features", pa.list_(pa.float32())),  # (E,), as the encoder gives them
    ]
)

ASSIGNED = pa.schema(
    [
        ("sample_id", pa.string()),
        ("split", pa.string()),
        ("path", pa.string()),
        ("frame", pa.string()),
        ("cluster", pa.int32()),  # -1: noise
    ]
)
"""Assignments of all slices by one cell of a study's grid."""


def subset_masks(slices: pa.Table) -> dict[str, NDArray[np.bool_]]:
    """Masks (N,) of the rows in each known subset, by name, ``all`` first."""
    masks = {"all": np.ones(slices.num_rows, dtype=np.bool_)}
    for name in SUBSETS[1:]:
        if slices[name].null_count == 0:
            flags = slices[name].to_numpy(zero_copy_only=False)
            masks[name] = np.asarray(flags, dtype=np.bool_)
    return masks


def has_class_support(labels: Iterable[Hashable], subset: str) -> bool:
    """Whether every class among a subset's labels has enough slices for per-class metrics.

    Labels are names or indices; unlabelled slices (None, UNLABELLED) do not count.
    """
    counts = Counter(label for label in labels if label not in {None, UNLABELLED})
    return subset != "strict" or min(counts.values(), default=0) >= MIN_STRICT_SUPPORT


def matrix_of(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """(N, D) float32 matrix of a column of lists of equal length."""
    # Chunk by chunk, as an array of lists may have no more than 2^31 numbers.
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(values, dtype=np.float32).reshape(len(column), -1)
