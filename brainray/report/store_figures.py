"""Figures of an image store: class distribution, preprocessing examples, leakage examples."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from brainray import layout
from brainray.mri.skull_strip import StrippedSlice
from brainray.report.figures import SlicePair, class_distribution, slice_pairs
from brainray.report.style import new_figure, png_bytes
from brainray.storage import Folder

_TILE = 96  # pixels
_SHEET_COLUMNS = 4  # slices, each three tiles wide
_OUTLINE = (0, 220, 120)  # RGB


def draw_store_figures(
    store: Folder,
    num_slices: Mapping[str, Mapping[str, int]],
    stripped: Sequence[SlicePair],
    sheet: Sequence[StrippedSlice],
    leaked: Sequence[SlicePair],
) -> None:
    """Write the class distribution and the figures for which there are examples.

    Args:
        store: folder of the image store.
        num_slices: counts by split and class, as in the store's manifest.
        stripped: slices before and after skull stripping.
        sheet: slices for the contact sheet of skull stripping.
        leaked: test slices and the training slices that they match.
    """
    figures = {f"{layout.FIGURES}/class_distribution.png": class_distribution(num_slices)}
    if stripped:
        title = "Slices before and after skull stripping"
        figure = slice_pairs(stripped, title, "before", "after")
        figures[f"{layout.FIGURES}/skull_strip.png"] = figure
    if sheet:
        figures[f"{layout.FIGURES}/contact_sheet.png"] = contact_sheet(sheet)
    if leaked:
        title = "Test slices and matching training slices"
        figure = slice_pairs(leaked, title, "test", "training")
        figures[f"{layout.FIGURES}/leakage_pairs.png"] = figure
    for name, figure in figures.items():
        store.write_bytes(name, png_bytes(figure))


def contact_sheet(slices: Sequence[StrippedSlice]) -> Figure:
    """Each slice before skull stripping, with the outline of the mask, and after."""
    rows = []
    for start in range(0, len(slices), _SHEET_COLUMNS):
        tiles = [tile for item in slices[start : start + _SHEET_COLUMNS] for tile in _tiles(item)]
        blank = [np.full((_TILE, _TILE, 3), 255, np.uint8)] * (3 * _SHEET_COLUMNS - len(tiles))
        rows.append(np.concatenate(tiles + blank, axis=1))
    mosaic = np.concatenate(rows)
    methods = sorted({item.method for item in slices})
    counts = ", ".join(f"{name}: {sum(item.method == name for item in slices)}" for name in methods)
    figure = new_figure(mosaic.shape[1] / 120, mosaic.shape[0] / 120 + 0.4)
    axes = figure.subplots()
    axes.imshow(mosaic, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"{len(slices)} random slices: before, mask outline, after ({counts})")
    return figure


def _tiles(item: StrippedSlice) -> list[NDArray[np.uint8]]:
    """Before, outlined and after: three (_TILE, _TILE, 3) uint8 images."""
    before, after = (_tile(image) for image in (item.before, item.after))
    outlined = before.copy()
    if item.mask is not None:
        mask = item.mask.astype(np.uint8)
        mask = cv2.resize(mask, (_TILE, _TILE), interpolation=cv2.INTER_NEAREST)
        outline = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        outlined[outline] = _OUTLINE
    return [before, outlined, after]


def _tile(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    small = cv2.resize(image, (_TILE, _TILE), interpolation=cv2.INTER_AREA)
    return np.repeat(np.asarray(small, dtype=np.uint8)[:, :, None], 3, axis=2)
