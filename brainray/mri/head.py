"""Position and size of the head in a slice: the reference frame for brain segmentation."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]  # (H, W)

_WORK_SIZE = 160  # pixels on the longer side
_HEAD_LEVEL = 0.45  # fraction of the way from the background to Otsu's threshold
_MIN_HEAD_RADIUS = 12.0  # pixels at the working size


@dataclass(frozen=True)
class Head:
    """A head at the working size; its largest inscribed circle gives the origin and unit length."""

    mask: NDArray[np.uint8]
    """(H, W) 0 or 1, without holes."""
    depth: Plane
    """(H, W) distance to the background, in radii."""
    centre: NDArray[np.float32]
    """(2,) x, y in pixels."""
    radius: float
    """Pixels."""
    signal: Plane
    """(H, W) grey values above the background, slightly smoothed."""


def find_head(image: NDArray[np.uint8]) -> Head | None:
    """Find the foreground of a slice (H, W); None if nothing stands out from the background.

    The search is done at a fixed working size, so neither speed nor result depends on the slice's.
    """
    height, width = image.shape
    scale = _WORK_SIZE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    mask = _head_mask(small)
    if mask is None:
        return None
    # The image border also bounds the head.
    framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.distanceTransform(framed, cv2.DIST_L2, 5)[1:-1, 1:-1]
    radius = float(depth.max())
    if radius < _MIN_HEAD_RADIUS:
        return None
    rows, columns = np.nonzero(depth >= 0.97 * radius)
    centre = np.array([columns.mean(), rows.mean()], np.float32)
    signal = cv2.GaussianBlur(small, (0, 0), 0.8).astype(np.float32)
    signal = np.maximum(signal - np.percentile(signal, 3), 0.0)
    return Head(mask, depth / np.float32(radius), centre, radius, signal)


def sample(plane: Plane, columns: NDArray[np.float32], rows: NDArray[np.float32]) -> Plane:
    """The plane's values at the given pixel positions, interpolated; 0 outside the plane."""
    return cv2.remap(plane, columns.astype(np.float32), rows.astype(np.float32), cv2.INTER_LINEAR)


def _head_mask(small: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    blurred = cv2.GaussianBlur(small, (0, 0), 1.2)
    otsu, _ = cv2.threshold(blurred, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    background = float(np.percentile(blurred, 3))
    # Bright scalp can dominate Otsu's threshold: about half of it also captures skin and neck.
    binary = (blurred > background + _HEAD_LEVEL * (otsu - background)).astype(np.uint8)
    opened = cv2.morphologyEx(binary, cv2.MORPH_OPEN, _disc(2))
    num_labels, labels, stats, _ = cv2.connectedComponentsWithStats(opened)
    if num_labels == 1:
        return None
    largest = (labels == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])).astype(np.uint8)
    contours, _ = cv2.findContours(_close(largest, 5), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    mask = np.zeros_like(small)
    cv2.drawContours(mask, [max(contours, key=cv2.contourArea)], -1, 1, cv2.FILLED)
    return mask


def _close(mask: NDArray[np.uint8], radius: int) -> NDArray[np.uint8]:
    """Closing with a disc; pixels outside the image count as background."""
    framed = cv2.copyMakeBorder(mask, *(radius,) * 4, cv2.BORDER_CONSTANT, value=0)
    closed = cv2.morphologyEx(framed, cv2.MORPH_CLOSE, _disc(radius))
    return np.ascontiguousarray(closed[radius:-radius, radius:-radius])


def _disc(radius: int) -> NDArray[np.uint8]:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
