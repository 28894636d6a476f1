"""Figures of an image store: what it holds, and what preprocessing did to it."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from brainray.report.figures import before_after_grid, class_distribution
from brainray.report.style import png_bytes
from brainray.storage import Folder


def draw_store_figures(
    store: Folder,
    num_slices: Mapping[str, Mapping[str, int]],
    samples: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]],
) -> list[str]:
    """Write the class distribution and, where there are samples, slices before and after.

    Args:
        store: the image store's folder.
        num_slices: counts by split and class, as in the store's manifest.
        samples: (title, before, after), the images (H, W) uint8.

    Returns:
        Names of the files in the folder.
    """
    figures = {"figures/class_distribution.png": class_distribution(num_slices)}
    if samples:
        figures["figures/skull_strip.png"] = before_after_grid(samples)
    for name, figure in figures.items():
        store.write_bytes(name, png_bytes(figure))
    return list(figures)
