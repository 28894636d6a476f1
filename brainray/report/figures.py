"""Figures of finished results; functions take plain values, return a matplotlib ``Figure``.

Nothing is written. Figures of a history leave out metrics that no epoch logged; the result is None
if no metric is left.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from brainray.errors import DataError
from brainray.report.cells import PREDICTOR_TITLES
from brainray.report.curves import (
    ACCURACIES,
    AGREEMENT,
    EFFECTIVE_RANK,
    LOSSES,
    SHARES,
    SILHOUETTE,
    Curve,
)
from brainray.report.maps import SliceMap
from brainray.report.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    class_colours,
    cluster_colour,
    count_epochs,
    new_figure,
    tidy,
    wrapped,
)
from brainray.schema import History

UNLABELLED_CLASS = ""
"""Class name of unlabelled slices, in counts and labels."""

UNLABELLED_NAME = "(no label)"
"""How unlabelled slices are named where they are shown."""

_LINE = 0.17  # inches, height of a line of text
_MAX_COLUMNS = 5
_MAX_BARS = 40  # of a distribution of classes
_MAX_CONFUSION_SIDE = 20.0  # inches
_MAX_CLASSES_WITH_COUNTS = 25  # with more, they would not fit the cells
_MAX_LEGEND_ROWS = 10  # beside a map
_MAX_LEGEND_NAMES = 40  # no legend of more: colours repeat too often


@dataclass(frozen=True)
class Confusion:
    """One confusion matrix."""

    title: str
    counts: NDArray[np.int64]  # (C, C): row = label, column = prediction


_HEALTH = {
    "NMI of the clusters": AGREEMENT,
    "Silhouette (clean test)": SILHOUETTE,
    "Effective rank of the embeddings": EFFECTIVE_RANK,
    "Share of the slices in a cluster": SHARES,
}
_TIMES = {
    "time/train_s": ("train", BLUE),
    "time/embed_s": ("embed", SKY),
    "time/recluster_s": ("re-cluster", GREEN),
    "time/evaluate_s": ("evaluate", ORANGE),
    "time/report_s": ("report and save", PURPLE),
}


def class_distribution(num_slices: Mapping[str, Mapping[str, int]]) -> Figure:
    """Slices by class, with one panel per non-empty split and a common scale.

    Of many classes, it shows the largest and the sum of the others.

    Args:
        num_slices: counts by split and class; the class "" is that of unlabelled slices.

    Raises:
        DataError: no split has a slice.
    """
    filled = {split: counts for split, counts in num_slices.items() if sum(counts.values())}
    if not filled:
        raise DataError("no slices to count: all splits are empty")
    names, splits = _with_few_classes(filled)
    every = {name for counts in filled.values() for name in counts} - {UNLABELLED_CLASS}
    colours = dict.fromkeys(names, GREY) | class_colours(sorted(every))
    if any(counts.get(UNLABELLED_CLASS) for counts in splits.values()):
        names.append(UNLABELLED_CLASS)
        colours[UNLABELLED_CLASS] = GREY
    largest = max(max(counts.values()) for counts in splits.values())
    shown = [wrapped(name) or UNLABELLED_NAME for name in names]
    pitch = max(0.4, _LINE * max(name.count("\n") + 1 for name in shown))
    figure = new_figure(8.0, 1.3 + pitch * len(names))
    panels = figure.subplots(1, len(splits), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (split, counts) in zip(panels, splits.items(), strict=True):
        values = [counts.get(name, 0) for name in names]
        bars = axes.barh(shown, values, color=[colours[name] for name in names])
        axes.bar_label(bars, labels=[f"{value:,}" for value in values], padding=3)
        axes.set_title(f"{split}: {sum(values):,} slices by class")
        axes.set_xlabel("slices")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        tidy(axes, grid="x")
    panels[0].set_xlim(0, 1.2 * largest)  # room for the numbers
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _with_few_classes(
    splits: Mapping[str, Mapping[str, int]],
) -> tuple[list[str], Mapping[str, Mapping[str, int]]]:
    """Classes to show, sorted and without the unlabelled one, and the counts of these."""
    total: Counter[str] = Counter()
    for counts in splits.values():
        total.update(counts)
    del total[UNLABELLED_CLASS]
    names = sorted(total)
    if len(names) <= _MAX_BARS:
        return names, splits
    shown = sorted(sorted(names, key=lambda name: -total[name])[: _MAX_BARS - 1])
    others = f"{len(names) - len(shown):,} other classes"
    merged = {}
    for split, counts in splits.items():
        kept = {name: counts.get(name, 0) for name in (*shown, UNLABELLED_CLASS)}
        merged[split] = kept | {others: sum(counts.values()) - sum(kept.values())}
    return [*shown, others], merged


@dataclass(frozen=True)
class SlicePair:
    """Two slices to compare, possibly of different sizes."""

    title: str
    upper: NDArray[np.uint8]  # (H, W)
    lower: NDArray[np.uint8]  # (H, W)


def slice_pairs(samples: Sequence[SlicePair], title: str, upper: str, lower: str) -> Figure:
    """Pairs of slices, one above the other; ``upper`` and ``lower`` say what these are."""
    figure, pairs = _paired_grid(len(samples), side=1.7)
    figure.suptitle(title)
    for (above, below), sample in zip(pairs, samples, strict=True):
        above.set_title(wrapped(sample.title), fontsize=7)
        for axes, image in ((above, sample.upper), (below, sample.lower)):
            axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    for above, below in pairs[:: _num_columns(len(pairs))]:
        above.set_ylabel(upper)
        below.set_ylabel(lower)
    return figure


def loss_curves(history: History) -> Figure:
    """Training losses by epoch."""
    figure = new_figure(8.0, 3.6)
    axes = figure.subplots()
    _draw_curves(axes, history, LOSSES)
    axes.set_title("Training loss by epoch")
    axes.legend(frameon=False)
    axes.set_ylabel("mean loss over the epoch's steps")
    return figure


def accuracy_curves(history: History, chosen_epoch: int) -> Figure:
    """Accuracies of both predictors by epoch, and the epoch chosen by validation."""
    figure = new_figure(8.0, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (predictor, curves) in zip(panels, ACCURACIES.items(), strict=True):
        _draw_curves(axes, history, curves, chosen_epoch)
        axes.set_title(f"Accuracy of the {PREDICTOR_TITLES[predictor]}")
    panels[0].set_ylabel("accuracy")
    panels[0].set_ylim(panels[0].get_ylim()[0] - 0.03, 1.01)  # room for the outermost markers
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
    )
    return figure


def clustering_health(history: History, chosen_epoch: int) -> Figure:
    """Metrics by epoch that reveal a collapse, which a high silhouette alone would hide; a panel
    for each that was logged.
    """
    logged = {
        title: curves
        for title, curves in _HEALTH.items()
        if any(curve.metric in metrics for curve in curves for metrics in history)
    }
    num_columns = min(2, len(logged))
    num_rows = ceil(len(logged) / num_columns)
    figure = new_figure(8.0, 2.8 * num_rows)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes, (title, curves) in zip(panels, logged.items(), strict=False):
        _draw_curves(axes, history, curves, chosen_epoch)
        axes.set_title(title)
        axes.legend(fontsize=8, framealpha=0.9)
    for axes in panels[len(logged) :]:
        axes.set_axis_off()
    return figure


def timing_breakdown(history: History) -> Figure:
    """Seconds of each part of each epoch, stacked."""
    logged = [name for name in _TIMES if any(name in metrics for metrics in history)]
    epochs = [int(metrics["epoch"]) for metrics in history]
    figure = new_figure(8.0, 3.6)
    axes = figure.subplots()
    bottom = np.zeros(len(history))
    for name in logged:
        # The last parts are missing for an epoch after which the run was interrupted.
        seconds = np.array([metrics.get(name, 0.0) for metrics in history])
        label, colour = _TIMES[name]
        axes.bar(epochs, seconds, bottom=bottom, color=colour, label=label)
        bottom += seconds
    axes.set_title("Time per epoch by part")
    axes.set_ylabel("seconds")
    count_epochs(axes)
    tidy(axes, grid="y")
    figure.legend(loc="outside lower center", ncols=len(logged), frameon=False)
    return figure


def confusion_counts(
    labels: Sequence[str], predictions: Sequence[str], classes: Sequence[str]
) -> NDArray[np.int64]:
    """(C, C) counts: row = label, column = prediction.

    Raises:
        DataError: a label or a prediction is not among the classes.
    """
    unknown = sorted({*labels, *predictions} - set(classes))
    if unknown:
        raise DataError(
            f"{unknown[0]!r} is not a class of the run ({', '.join(classes)}): "
            "map it to one with classes.map"
        )
    return np.asarray(confusion_matrix(labels, predictions, labels=list(classes)))


def confusion_matrices(panels: Sequence[Confusion], classes: Sequence[str], title: str) -> Figure:
    """Confusion matrices; cells are shaded by their share of the row, and show counts that fit."""
    lines = [wrapped(name).split("\n") for name in classes]
    pitch = max(0.85, _LINE * (1 + max(map(len, lines))))
    side = min(max(3.0, pitch * len(classes)), _MAX_CONFUSION_SIDE)
    beside = 0.1 * max(len(line) for name in lines for line in name)
    width, height = 0.6 + beside + side * len(panels), 0.9 + beside + side
    figure = new_figure(width, height, "compressed")
    figure.suptitle(title)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_confusion(axes, panel, classes)
    totals = panels[0].counts.sum(axis=1)
    all_axes[0].set_yticks(
        range(len(classes)),
        [f"{wrapped(name)}\n({total:,})" for name, total in zip(classes, totals, strict=True)],
    )
    all_axes[0].set_ylabel("label (slices)")
    return figure


def embedding_maps(maps: Sequence[SliceMap], classes: Sequence[str], chosen_epoch: int) -> Figure:
    """t-SNE maps of the same slices by epoch, coloured by class (top) and cluster (bottom).

    Args:
        maps: one per epoch, with equal ``sample_id``, ``label`` and order of rows.
        classes: all classes; their order determines the colours.
        chosen_epoch: the epoch that is marked.
    """
    labels = [label or UNLABELLED_CLASS for label in maps[0].rows["label"].to_pylist()]
    colour_of = class_colours(classes)
    if UNLABELLED_CLASS in labels:
        colour_of[UNLABELLED_CLASS] = GREY
    by_class = {name or UNLABELLED_NAME: colour for name, colour in colour_of.items()}
    clusters = sorted({k for each in maps for k in each.rows["cluster"].to_pylist()})
    by_cluster = {f"cluster {k}": cluster_colour(k) for k in clusters}
    room = max(legend_width(by_class), legend_width(by_cluster))
    figure, pairs = _paired_grid(len(maps), side=2.2, room_beside=room)
    figure.suptitle(f"t-SNE of the embeddings of {len(labels):,} test slices")
    for (upper, lower), each in zip(pairs, maps, strict=True):
        upper.set_title(f"epoch {each.epoch}" + " (chosen)" * (each.epoch == chosen_epoch))
        _draw_points(upper, each.points, [colour_of[label] for label in labels])
        found = each.rows["cluster"].to_numpy()
        _draw_points(lower, each.points, [cluster_colour(k) for k in found.tolist()])
        for cluster in np.unique(found):
            x, y = np.median(each.points[found == cluster], axis=0)
            box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "alpha": 0.85, "linewidth": 0}
            lower.text(x, y, str(cluster), ha="center", va="center", weight="bold", bbox=box)
    num_columns = _num_columns(len(pairs))
    for upper, lower in pairs[::num_columns]:
        upper.set_ylabel("by class")
        lower.set_ylabel("by cluster")
    last_upper, last_lower = pairs[num_columns - 1]
    legend_beside(last_upper, by_class)
    legend_beside(last_lower, by_cluster)
    return figure


def _draw_curves(
    axes: Axes, history: History, curves: Sequence[Curve], chosen_epoch: int | None = None
) -> None:
    for curve in curves:
        points = [(m["epoch"], m[curve.metric]) for m in history if curve.metric in m]
        if points:
            epochs, values = zip(*points, strict=True)
            axes.plot(
                epochs,
                values,
                color=curve.colour,
                linestyle=curve.line,
                marker="o",
                markersize=3.5,
                label=curve.label,
            )
    if chosen_epoch is not None:
        label = f"chosen epoch ({chosen_epoch})"
        axes.axvline(chosen_epoch, color=BLACK, linestyle=":", linewidth=1.2, label=label)
    count_epochs(axes)
    tidy(axes, grid="y")


def _draw_confusion(axes: Axes, panel: Confusion, classes: Sequence[str]) -> None:
    totals = panel.counts.sum(axis=1, keepdims=True)
    shares = panel.counts / np.maximum(totals, 1)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    shows_counts = len(classes) <= _MAX_CLASSES_WITH_COUNTS
    for row, column in np.ndindex(panel.counts.shape) if shows_counts else ():
        share = shares[row, column]
        text = f"{panel.counts[row, column]:,}"
        if totals[row, 0]:
            text += f"\n{share:.0%}"
        colour = "white" if share > 0.55 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_title(panel.title)
    axes.set_xlabel("prediction")
    names = [wrapped(name) for name in classes]
    if any("\n" in name for name in names):  # slanted, lines of neighbours would overlap
        axes.set_xticks(range(len(classes)), names, rotation=90)
    else:
        axes.set_xticks(range(len(classes)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)


def _draw_points(axes: Axes, points: NDArray[np.floating], colours: Sequence[str]) -> None:
    """One scatter plot in row order: plotted by class, the last class would hide the first."""
    axes.scatter(points[:, 0], points[:, 1], c=colours, s=5, linewidths=0)
    axes.set_box_aspect(1)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_anchor("E")  # next to the legend, for which the layout has left room


def legend_width(names: Collection[str]) -> float:
    """Inches that `legend_beside` takes."""
    if len(names) > _MAX_LEGEND_NAMES:
        return 0.0
    return ceil(len(names) / _MAX_LEGEND_ROWS) * max(1.5, 0.6 + 0.08 * max(map(len, names)))


def legend_beside(axes: Axes, colours: Mapping[str, str]) -> None:
    """Name the colours of dots to the right of a panel; too many are left out."""
    if len(colours) > _MAX_LEGEND_NAMES:
        return
    handles = [
        Line2D([], [], color=colour, label=name, marker="o", linestyle="", markersize=7)
        for name, colour in colours.items()
    ]
    axes.legend(
        handles,
        list(colours),
        ncols=ceil(len(handles) / _MAX_LEGEND_ROWS),
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
    )


def _num_columns(num_pairs: int) -> int:
    """Columns of a grid with the fewest bands, all about equally long."""
    return ceil(num_pairs / ceil(num_pairs / _MAX_COLUMNS))


def _paired_grid(
    num_pairs: int, *, side: float, room_beside: float = 0.0
) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Pairs of square panels without ticks, one above the other; sizes in inches."""
    num_columns = _num_columns(num_pairs)
    num_bands = ceil(num_pairs / num_columns)
    width = max(5.0, 0.4 + side * num_columns + room_beside)
    figure = new_figure(width, 0.8 + 2.0 * side * num_bands, "compressed")
    grid = figure.subplots(2 * num_bands, num_columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    pairs = [
        (grid[2 * band, column], grid[2 * band + 1, column])
        for band in range(num_bands)
        for column in range(num_columns)
    ]
    for unused in pairs[num_pairs:]:
        for axes in unused:
            axes.set_axis_off()
    return figure, pairs[:num_pairs]
