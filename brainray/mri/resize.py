"""Geometry and intensity transforms of the stored slices."""

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.schema import THUMBNAIL_SIDE


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
