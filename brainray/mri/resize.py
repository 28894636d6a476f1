"""Geometry and intensity transforms of the stored slices."""

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.schema import THUMBNAIL_SIDE

MID_GREY = 0.3  # of the full range: close to that of unmodified heads
_MAX_POWER = 4.0  # and its inverse; beyond these, most of a slice would be black or white


def stretch(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resize (H, W) to (side, side), ignoring the aspect ratio (METHOD A)."""
    return _resize(image, side, side)


def letterbox(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resize (H, W) to (side, side), keeping the aspect ratio and padding with 0 (METHOD B)."""
    height, width = image.shape
    scale = side / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (side - new_height) // 2, (side - new_width) // 2
    canvas = np.zeros((side, side), dtype=np.uint8)
    canvas[top : top + new_height, left : left + new_width] = _resize(image, new_height, new_width)
    return canvas


def crop_foreground(image: NDArray[np.uint8], foreground: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Crop (H, W) to the bounding box of a mask (H, W); unchanged if the mask is empty."""
    x, y, width, height = cv2.boundingRect(foreground.astype(np.uint8))
    return image[y : y + height, x : x + width] if width else image


def min_max(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Stretch intensities linearly to 0..255; a constant slice becomes 0."""
    return np.asarray(cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX), dtype=np.uint8)


def auto_gamma(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Apply `min_max`, then the power that maps the median of pixels above 0 to ``MID_GREY``.

    The result does not depend on the brightness or gamma of the slice, up to rounding, if the power
    is between 1/4 and 4.

    Source: after Babakhani & Zarei, "Automatic gamma correction based on average of brightness",
    2015 (which uses the mean of all pixels, and 0.5).
    """
    stretched = min_max(image)
    histogram = cv2.calcHist([stretched], [0], None, [256], [0, 256]).ravel()
    histogram[0] = 0.0
    median = np.searchsorted(histogram.cumsum(), histogram.sum() / 2)
    power = np.log(MID_GREY) / np.log(np.clip(median, 1, 254) / 255)
    power = np.clip(power, 1 / _MAX_POWER, _MAX_POWER)
    table = np.rint(255 * (np.arange(256) / 255) ** power).astype(np.uint8)
    return np.asarray(cv2.LUT(stretched, table), dtype=np.uint8)


def thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fingerprint of the slice: area-averaged to 96 x 96, whatever its size."""
    return np.asarray(
        cv2.resize(image, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)
    )


def _resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    # Area averaging avoids aliasing when shrinking, but is nearest-neighbour when enlarging.
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation))
