"""Copies of one slice: byte-identical files, and slices whose thumbnails nearly coincide.

Thumbnails are 32 x 32 uint8; two slices whose standardised thumbnails correlate above 0.999 are
the same slice, re-encoded or rescaled (METHOD, "Data": such pairs were looked at; from 0.985 to
0.999 they are neighbouring slices of one patient).
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from brainray.schema import THUMBNAIL_SIDE

SAMPLE_ID_DIGITS = 32

_BLOCK_ROWS = 2048


def content_hash(content: bytes) -> str:
    """SHA-256 of the file's bytes, as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def sample_id(digest: str) -> str:
    """The identity of a slice: the first 128 bits of its content hash."""
    return digest[:SAMPLE_ID_DIGITS]


def near_duplicate_groups(
    thumbnails: NDArray[np.uint8], sample_ids: Sequence[str], *, threshold: float
) -> list[str]:
    """Group id of each slice: the smallest sample_id that a chain of near-duplicates reaches.

    Args:
        thumbnails: (N, 1024) uint8.
        sample_ids: N ids; equal ids (identical bytes) share a group by themselves.
        threshold: least correlation of standardised thumbnails.
    """
    num_slices = len(sample_ids)
    rows, columns = [], []
    for start, correlation in _correlation_blocks(thumbnails, thumbnails):
        row, column = np.nonzero(correlation >= threshold)
        keep = row + start < column
        rows.append(row[keep] + start)
        columns.append(column[keep])
    row_index = np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int64)
    column_index = np.concatenate([*columns, np.empty(0, np.int64)]).astype(np.int64)
    links = coo_array(
        (np.ones(len(row_index), np.int8), (row_index, column_index)),
        shape=(num_slices, num_slices),
    )
    _, component = connected_components(links, directed=False)
    smallest: dict[int, str] = {}
    for group, identity in zip(component.tolist(), sample_ids, strict=True):
        smallest[group] = min(identity, smallest.get(group, identity))
    return [smallest[group] for group in component.tolist()]


def has_near_duplicate(
    queries: NDArray[np.uint8], references: NDArray[np.uint8], *, threshold: float
) -> NDArray[np.bool_]:
    """Whether each query thumbnail (N, 1024) has a near-duplicate among references (M, 1024)."""
    correlation, _ = most_similar(queries, references)
    return np.asarray(correlation >= threshold)


def most_similar(
    queries: NDArray[np.uint8], references: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Highest thumbnail correlation (N,) of each query, and the index (N,) of that reference.

    Without references the correlation is -1 and the index -1.
    """
    if len(references) == 0:
        return np.full(len(queries), -1, np.float32), np.full(len(queries), -1, np.int64)
    best = [np.empty(0, np.float32)]
    index = [np.empty(0, np.int64)]
    for _, correlation in _correlation_blocks(queries, references):
        nearest = correlation.argmax(axis=1)
        index.append(nearest.astype(np.int64))
        best.append(np.take_along_axis(correlation, nearest[:, None], axis=1)[:, 0])
    return np.concatenate(best), np.concatenate(index)


def thumbnail_matrix(thumbnails: Sequence[bytes]) -> NDArray[np.uint8]:
    """Stored thumbnails as (N, 1024) uint8."""
    pixels = np.frombuffer(b"".join(thumbnails), dtype=np.uint8)
    return pixels.reshape(-1, THUMBNAIL_SIDE * THUMBNAIL_SIDE)


def standardise(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rows with mean 0 and length 1, so that dot products are correlations; constant rows 0."""
    values = thumbnails.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, length, out=np.zeros_like(values), where=length > 0)


def _correlation_blocks(
    queries: NDArray[np.uint8], references: NDArray[np.uint8]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first query row, correlations of a block of queries with all references)."""
    standard_queries, standard_references = standardise(queries), standardise(references)
    for start in range(0, len(queries), _BLOCK_ROWS):
        block = standard_queries[start : start + _BLOCK_ROWS]
        yield start, block @ standard_references.T
