"""Figures of an image store: class distribution, preprocessing examples, leakage examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from brainray import layout
from brainray.mri.skull_strip import StrippedSlice
from brainray.report.figures import before_after_grid, class_distribution
from brainray.report.style import new_figure, png_bytes
from brainray.storage import Folder

_TILE = 96  # pixels
_SHEET_COLUMNS = 4  # slices, each three tiles wide
_OUTLINE = (0, 220, 120)  # RGB
_PAIR_COLUMNS = 6


@dataclass(frozen=True)
class SlicePair:
    """A test slice and the training slice that it matches."""

    title: str
    tested: NDArray[np.uint8]  # (H, W)
    trained: NDArray[np.uint8]  # (H, W), possibly of a different size


def draw_store_figures(
    store: Folder,
    num_slices: Mapping[str, Mapping[str, int]],
    before_after: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]],
    sheet: Sequence[StrippedSlice],
    pairs: Sequence[SlicePair],
) -> None:
    """Write the class distribution and the figures for which there are examples.

    Args:
        store: folder of the image store.
        num_slices: counts by split and class, as in the store's manifest.
        before_after: (title, before, after), with images (H, W) uint8.
        sheet: slices for the contact sheet of skull stripping.
        pairs: examples of leakage.
    """
    figures = {f"{layout.FIGURES}/class_distribution.png": class_distribution(num_slices)}
    if before_after:
        figures[f"{layout.FIGURES}/skull_strip.png"] = before_after_grid(before_after)
    if sheet:
        figures[f"{layout.FIGURES}/contact_sheet.png"] = contact_sheet(sheet)
    if pairs:
        figures[f"{layout.FIGURES}/leakage_pairs.png"] = leakage_pairs(pairs)
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


def leakage_pairs(pairs: Sequence[SlicePair]) -> Figure:
    """Test slices (top) and matching training slices (bottom)."""
    num_rows = -(-len(pairs) // _PAIR_COLUMNS)
    figure = new_figure(1.7 * _PAIR_COLUMNS, 3.6 * num_rows + 0.4)
    figure.suptitle("Test slices (top) and matching training slices (bottom)")
    grid = figure.subplots(2 * num_rows, _PAIR_COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, pair in enumerate(pairs):
        row, column = divmod(number, _PAIR_COLUMNS)
        upper, lower = grid[2 * row, column], grid[2 * row + 1, column]
        upper.set_title(pair.title, fontsize=7)
        upper.imshow(pair.tested, cmap="gray", vmin=0, vmax=255)
        lower.imshow(pair.trained, cmap="gray", vmin=0, vmax=255)
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
