"""Thumbnails: fingerprints as a matrix, and their nearest neighbours, the memory baseline."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from brainray.schema import THUMBNAIL_SIDE

COARSE_SIDE = 32

_BLOCK_ROWS = 2048
_BLOCK_COLUMNS = 2**16


def thumbnail_matrix(thumbnails: Sequence[bytes]) -> NDArray[np.uint8]:
    """Stored fingerprints as (N, side * side) uint8."""
    pixels = np.frombuffer(b"".join(thumbnails), dtype=np.uint8)
    return pixels.reshape(-1, THUMBNAIL_SIDE * THUMBNAIL_SIDE)


def coarse(fingerprints: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The 32 x 32 thumbnails (N, 1024) for METHOD's metrics: block means of fingerprints."""
    factor = THUMBNAIL_SIDE // COARSE_SIDE
    blocks = fingerprints.reshape(-1, COARSE_SIDE, factor, COARSE_SIDE, factor)
    return (
        np.rint(blocks.mean(axis=(2, 4), dtype=np.float32))
        .astype(np.uint8)
        .reshape(-1, COARSE_SIDE**2)
    )


def most_similar(
    queries: NDArray[np.uint8], references: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Highest correlation (N,) of each query thumbnail, and the index (N,) of that reference.

    Without references both are -1.
    """
    best = np.full(len(queries), -1, np.float32)
    index = np.full(len(queries), -1, np.int64)
    for first in range(0, len(references), _BLOCK_COLUMNS):
        columns = standardise(references[first : first + _BLOCK_COLUMNS]).T
        for start in range(0, len(queries), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            correlation = standardise(queries[block]) @ columns
            nearest = correlation.argmax(axis=1)
            highest = np.take_along_axis(correlation, nearest[:, None], axis=1)[:, 0]
            is_better = (highest > best[block]) | (index[block] < 0)
            best[block] = np.where(is_better, highest, best[block])
            index[block] = np.where(is_better, first + nearest, index[block])
    return best, index


def standardise(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rows with mean 0 and length 1, so that dot products are correlations; 0 for constant rows."""
    values = thumbnails.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, length, out=np.zeros_like(values), where=length > 0)
