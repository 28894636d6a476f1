"""Brain masks by classical image processing."""

import cv2
import numpy as np
from numpy.typing import NDArray

BLUR_SIGMA = 3.0  # pixels
THRESHOLD_RELAXATION = 5  # of 0..255
KERNEL_RADIUS = 5  # pixels

_KERNEL = cv2.getStructuringElement(
    cv2.MORPH_ELLIPSE, (2 * KERNEL_RADIUS + 1, 2 * KERNEL_RADIUS + 1)
)


def otsu_mask(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Head mask (H, W) of a slice (H, W): METHOD A, step 3.

    Gaussian blur, Otsu's threshold relaxed by 5, closing then opening with an elliptical kernel
    of radius 5, largest connected component. On real heads this keeps skull and scalp: it
    removes the background and little else.

    Source: Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    blurred = cv2.GaussianBlur(image, (0, 0), BLUR_SIGMA)
    otsu, _ = cv2.threshold(blurred, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    binary = (blurred > otsu - THRESHOLD_RELAXATION).astype(np.uint8)
    closed = cv2.morphologyEx(binary, cv2.MORPH_CLOSE, _KERNEL)
    opened = cv2.morphologyEx(closed, cv2.MORPH_OPEN, _KERNEL)
    return _largest_component(opened)


def apply_mask(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The slice with everything outside the mask set to 0."""
    return np.where(mask, image, np.uint8(0))


def _largest_component(binary: NDArray[np.uint8]) -> NDArray[np.bool_]:
    num_labels, labels, stats, _ = cv2.connectedComponentsWithStats(binary, connectivity=8)
    if num_labels == 1:  # background only: nothing stands out, so nothing is removed
        return np.ones(binary.shape, dtype=np.bool_)
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    return np.asarray(labels == largest)
