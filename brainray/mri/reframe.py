"""Copies in another frame: fingerprints of the head alone, independent of field of view and
brightness.

Collections pad slices to squares, crop them to the head, add a border or darken them, more than the
alignment of whole-frame fingerprints tolerates. Fingerprints of the head alone remain comparable.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.config import NearDuplicateConfig
from brainray.mri.duplicates import Twins, find_twins
from brainray.mri.row_file import RowFile, Rows, row_blocks
from brainray.mri.skull_strip import without_frame
from brainray.schema import THUMBNAIL_SIDE

_MARGIN = 0.08  # around the head, as a fraction of its extent
_BLUR_SIGMA = 1.4  # pixels: an enlarged small head would otherwise be the smoother of the two
_THRESHOLD = 0.5  # of Otsu's threshold: includes a dim scalp
_OPENING = np.ones((3, 3), np.uint8)  # removes letters and thin lines next to the head
_LEAST_SIMILARITY = 0.9975  # high: smoothing makes neighbouring slices more alike
_QUANTILES = (1.0, 99.5)  # percentiles mapped to black and white
_READ_ROWS = 1024


def find_twins_by_head(queries: Rows, references: Rows, settings: NearDuplicateConfig) -> Twins:
    """`find_twins` on the heads alone, for queries (Q, 9216) and references (R, 9216)."""
    least = {
        name: max(_LEAST_SIMILARITY, getattr(settings, name))
        for name in ("similarity", "turned_similarity")
    }
    stricter = settings.model_copy(update=least)
    return find_twins(reframed(queries), reframed(references), stricter)


def reframed(fingerprints: Rows) -> Rows:
    """Fingerprints (N, 9216) cropped to the head and stretched to the full range of greys.

    A fingerprint without a head is unchanged. The result is kept in a file.
    """
    cropped = RowFile(THUMBNAIL_SIDE**2, np.uint8)
    for block in row_blocks(np.arange(len(fingerprints)), _READ_ROWS):
        cropped.append(np.stack([_reframed(row) for row in fingerprints[block]]))
    return cropped


def _reframed(fingerprint: NDArray[np.uint8]) -> NDArray[np.uint8]:
    side = THUMBNAIL_SIDE
    picture = without_frame(fingerprint.reshape(side, side))
    otsu, _ = cv2.threshold(picture, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    bright = (picture > max(_THRESHOLD * otsu, 1.0)).astype(np.uint8)
    bright = cv2.morphologyEx(bright, cv2.MORPH_OPEN, _OPENING)
    num_labels, _, stats, _ = cv2.connectedComponentsWithStats(bright)
    if num_labels == 1:
        return fingerprint
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    axes = ((cv2.CC_STAT_LEFT, cv2.CC_STAT_WIDTH), (cv2.CC_STAT_TOP, cv2.CC_STAT_HEIGHT))
    first, extent = np.array([stats[largest, list(axis)] for axis in axes], np.float32).T
    scale = extent * (1 + 2 * _MARGIN) / side
    start = first - _MARGIN * extent + scale / 2 - 0.5  # centre of the first pixel
    mapping = np.column_stack([np.diag(scale), start])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cropped = cv2.warpAffine(picture.astype(np.float32), mapping, (side, side), flags=flags)
    return _stretched(cv2.GaussianBlur(cropped, (0, 0), _BLUR_SIGMA)).ravel()


def _stretched(picture: NDArray[np.float32]) -> NDArray[np.uint8]:
    low, high = np.percentile(picture, _QUANTILES)
    values = (picture - low) * (255.0 / max(high - low, 1.0))
    return np.asarray(np.rint(np.clip(values, 0.0, 255.0)), np.uint8)
