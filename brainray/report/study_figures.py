"""Figures of a study; each function takes plain values and returns a matplotlib ``Figure``."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.cluster import hierarchy

from brainray.report.figures import (
    UNLABELLED_CLASS,
    UNLABELLED_NAME,
    legend_beside,
    legend_width,
)
from brainray.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    class_colours,
    cluster_colour,
    count_epochs,
    new_figure,
    tidy,
)
from brainray.schema import NOISE

_TILE = 80  # pixels
_MAX_LEVELS = 100  # of a dendrogram: SciPy calls itself for each


def explained_variance(shares: Mapping[str, NDArray[np.floating]]) -> Figure:
    """Cumulative explained variance by number of principal components, one line per feature set.

    Args:
        shares: by feature set, (D,) share of the variance of each component.
    """
    figure = new_figure(6.5, 3.6)
    axes = figure.subplots()
    for (name, values), colour in zip(
        shares.items(), class_colours(list(shares)).values(), strict=True
    ):
        axes.plot(np.arange(1, len(values) + 1), np.cumsum(values), color=colour, label=name)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("principal components")
    axes.set_ylabel("cumulative share of the variance")
    axes.set_title("Explained variance of the fitted slices' features")
    axes.legend(loc="lower right")
    tidy(axes, grid="y")
    return figure


def dendrogram(tree: NDArray[np.floating], depth: int) -> Figure:
    """The upper ``depth`` levels of a SciPy linkage matrix (N - 1, 4) by cosine distance."""
    depth = min(depth, _MAX_LEVELS)
    figure = new_figure(9.0, 4.0)
    axes = figure.subplots()
    hierarchy.dendrogram(
        tree,
        truncate_mode="level",
        p=depth,
        no_labels=True,
        color_threshold=0,
        above_threshold_color=BLUE,
        ax=axes,
    )
    axes.set_ylabel("cosine distance of the merged groups")
    axes.set_title(f"Agglomerative clustering of {len(tree) + 1:,} slices, upper {depth} levels")
    tidy(axes, grid="y")
    return figure


def k_distance_curve(distances: NDArray[np.floating], knee: int, k: int) -> Figure:
    """Ascending distances (N,) to the k-th neighbour; the one at the knee is DBSCAN's eps."""
    figure = new_figure(6.5, 3.6)
    axes = figure.subplots()
    axes.plot(distances, color=BLUE)
    axes.axhline(
        distances[knee], color=VERMILLION, linestyle="--", label=f"eps = {distances[knee]:.3g}"
    )
    axes.axvline(knee, color=GREY, linestyle=":")
    axes.set_xlabel("slices, sorted by distance")
    axes.set_ylabel(f"distance to neighbour {k}")
    axes.set_title("k-distance curve and its knee")
    axes.legend(loc="upper left")
    tidy(axes, grid="y")
    return figure


@dataclass(frozen=True)
class Varied:
    """One panel of a sensitivity figure: the values of a setting and their metrics."""

    title: str
    values: Sequence[str]
    figures: Mapping[str, Sequence[tuple[float, float] | None]]  # (mean, sd) by name and value


def sensitivity(panels: Sequence[Varied]) -> Figure:
    """Means and standard deviations over seeds, one panel per setting."""
    colours = {"nmi": BLUE, "ari": GREEN, "silhouette": ORANGE, "noise share": GREY}
    figure = new_figure(4.2 * len(panels), 3.6)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.figures.items():
            found = [(i, *point) for i, point in enumerate(points) if point is not None]
            if not found:
                continue
            places, means, errors = zip(*found, strict=True)
            axes.errorbar(
                places, means, yerr=errors, marker="o", capsize=3, label=name, color=colours[name]
            )
        axes.set_xticks(range(len(panel.values)), panel.values, rotation=30, ha="right")
        axes.set_title(panel.title)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        tidy(axes, grid="y")
    return figure


def refinement(histories: Mapping[str, Sequence[Mapping[str, float]]], tolerance: float) -> Figure:
    """Share of changed assignments and, if labels exist, NMI of each refinement round.

    Args:
        histories: by encoder, its rounds with ``round``, ``changed_share`` and possibly ``nmi``.
        tolerance: share of changes below which refinement has converged.
    """
    figure = new_figure(11.0, 3.6)
    changed, agreement = figure.subplots(1, 2)
    for name, colour in class_colours(list(histories)).items():
        rounds = histories[name]
        steps = [(r["round"], r["changed_share"]) for r in rounds if "changed_share" in r]
        scored = [(r["round"], r["nmi"]) for r in rounds if "nmi" in r]
        for axes, points in ((changed, steps), (agreement, scored)):
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
    changed.axhline(tolerance, color=GREY, linestyle="--", label="tolerance")
    changed.set_ylabel("share of slices that changed cluster")
    agreement.set_ylabel("NMI with the labels (scoring only)")
    for axes in (changed, agreement):
        count_epochs(axes, "round")
        tidy(axes, grid="y")
    lines, names = changed.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right center", fontsize=8, frameon=False)
    return figure


def cluster_map(
    points: NDArray[np.floating],  # (N, 2)
    clusters: NDArray[np.integer],  # (N,) or NOISE
    labels: Sequence[str],  # (N,) "" if unknown
    title: str,
) -> Figure:
    """One t-SNE map coloured by cluster and by label; by cluster only if there are no labels."""
    known = sorted({name for name in labels if name != UNLABELLED_CLASS})
    groups = [
        {
            ("noise" if k == NOISE else str(k)): (
                clusters == k,
                GREY if k == NOISE else cluster_colour(int(k)),
            )
            for k in np.unique(clusters)
        }
    ]
    if known:
        names = np.array(labels, dtype=object)
        colours = class_colours(known) | {UNLABELLED_CLASS: GREY}
        groups.append(
            {
                name or UNLABELLED_NAME: (names == name, colours[name])
                for name in dict.fromkeys([*known, *labels])
            }
        )
    figure = new_figure(sum(5.0 + legend_width(by_name) for by_name in groups), 4.6)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, by_name, kind in zip(panels, groups, ("cluster", "label"), strict=False):
        for name, (rows, colour) in by_name.items():
            axes.scatter(*points[rows].T, s=5, color=colour, label=name, linewidths=0)
        axes.set(xticks=[], yticks=[], title=f"by {kind}")
        legend_beside(axes, {name: colour for name, (_, colour) in by_name.items()})
    figure.suptitle(title)
    return figure


@dataclass(frozen=True)
class ClusterTiles:
    """Slices of one cluster, (H, W) uint8 each."""

    name: str
    nearest: Sequence[NDArray[np.uint8]]  # to the centroid, nearest first
    farthest: Sequence[NDArray[np.uint8]]  # farthest first


def cluster_sheet(clusters: Sequence[ClusterTiles], title: str) -> Figure:
    """One row per cluster: the slices nearest to its centroid, then the farthest."""
    most_near = max(len(row.nearest) for row in clusters)
    most_far = max(len(row.farthest) for row in clusters)
    width = 1.2 + 0.72 * (most_near + most_far + 1)
    text = f"{title}: nearest to the centroid (left), farthest (right)"
    lines = textwrap.wrap(text, int(12 * width))
    figure = new_figure(width, 0.4 + 0.15 * len(lines) + 0.85 * len(clusters))
    grid = figure.subplots(len(clusters), 1, squeeze=False)[:, 0]
    gap = np.full((_TILE, _TILE // 4), 255, dtype=np.uint8)
    for axes, row in zip(grid, clusters, strict=True):
        tiles = [*_tiles(row.nearest, most_near), gap, *_tiles(row.farthest, most_far)]
        axes.imshow(np.concatenate(tiles, axis=1), cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(row.name, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle("\n".join(lines), fontsize=9)
    return figure


def _tiles(images: Sequence[NDArray[np.uint8]], number: int) -> list[NDArray[np.uint8]]:
    """Tiles of the images, then white ones."""
    tiles = [cv2.resize(image, (_TILE, _TILE), interpolation=cv2.INTER_AREA) for image in images]
    return [*tiles, *[np.full((_TILE, _TILE), 255, np.uint8)] * (number - len(tiles))]
