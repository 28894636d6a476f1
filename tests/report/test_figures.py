"""Figures must show the numbers they were given."""

import warnings
from io import BytesIO
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import confusion_matrix

from brainray.errors import DataError
from brainray.report.figures import (
    Confusion,
    SlicePair,
    accuracy_curves,
    class_distribution,
    clustering_health,
    confusion_counts,
    confusion_matrices,
    embedding_maps,
    loss_curves,
    slice_pairs,
    timing_breakdown,
)
from brainray.report.maps import SliceMap
from brainray.report.style import GREY, class_colours, png_bytes

CLASSES = ["glioma", "meningioma", "notumor"]


def _texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def _curve(figure: Figure, label: str) -> NDArray[np.float64]:
    """(points, 2) of the only line with that label."""
    lines = [line for axes in figure.axes for line in axes.lines if line.get_label() == label]
    assert len(lines) == 1
    return np.asarray(lines[0].get_xydata())


def _map(
    epoch: int, points: NDArray[np.floating], labels: list[str], clusters: list[int]
) -> SliceMap:
    return SliceMap(
        epoch, points.astype(np.float32), pa.table({"label": labels, "cluster": clusters})
    )


def test_class_names_are_not_read_as_formulas() -> None:
    figure = class_distribution({"train": {"a$b_$": 1, "gl$\\foo$": 2}})
    assert png_bytes(figure)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_long_class_names_leave_room_for_the_figure(num_classes: int) -> None:
    names = [
        f"{number} {'astrocytoma, IDH-mutant, grade 4 ' * 3}"[:100] for number in range(num_classes)
    ]
    counts = np.eye(num_classes, dtype=np.int64)
    panels = [Confusion("head", counts), Confusion("clusters", counts)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # constrained layout warns where nothing is left
        png_bytes(confusion_matrices(panels, names, "all"))
        png_bytes(class_distribution({"train": dict.fromkeys(names, 3), "test": {names[0]: 1}}))


def test_names_of_a_confusion_matrix_stay_apart_and_inside_of_the_figure() -> None:
    names = [f"{number} {'Oligodendroglioma, ' * 5}" for number in range(4)]
    counts = np.eye(4, dtype=np.int64)
    panels = [Confusion("head", counts), Confusion("clusters", counts)]
    figure = confusion_matrices(panels, names, "all")
    figure.draw_without_rendering()
    assert all(axes.xaxis.label.get_window_extent().y0 >= 0 for axes in figure.axes)
    for labels in (figure.axes[0].get_yticklabels(), figure.axes[1].get_xticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(box.overlaps(following) for box, following in pairwise(boxes))
    title = next(iter(figure.texts)).get_window_extent()
    assert not any(axes.title.get_window_extent().overlaps(title) for axes in figure.axes)


def test_a_matrix_of_very_many_classes_stays_a_picture() -> None:
    classes = [str(number) for number in range(60)]
    counts = np.eye(60, dtype=np.int64)
    figure = confusion_matrices([Confusion("head", counts)], classes, "all")
    assert max(figure.get_size_inches()) < 25
    assert not _texts(figure.axes[0])


def test_of_very_many_classes_the_largest_are_shown_and_the_sum_of_the_others() -> None:
    counts = {f"class {number:04d}": number for number in range(1, 5001)}
    figure = class_distribution({"train": counts | {"": 9}, "test": {"class 0001": 3}})
    assert max(figure.get_size_inches()) < 25
    train, test = figure.axes
    shown = [label.get_text() for label in train.get_yticklabels()]
    assert shown[0] == "class 4962"
    assert shown[-2:] == ["4,961 other classes", "(no label)"]
    assert _texts(train)[0] == "4,962"
    assert _texts(train)[-2:] == [f"{sum(range(4962)):,}", "9"]
    assert _texts(test)[-2:] == ["3", "0"]
    assert train.get_xlim()[1] > sum(range(4962))
    every = class_colours(sorted(counts))
    colours = [to_hex(bar.get_facecolor()).upper() for bar in train.patches]
    assert colours[0] == every["class 4962"].upper()
    assert colours[-2:] == [GREY.upper()] * 2


def test_counts_stand_beside_their_bars() -> None:
    figure = class_distribution(
        {"train": {"": 7, "glioma": 1321, "meningioma": 40}, "test": {"glioma": 3}, "other": {}}
    )
    train, test = figure.axes
    assert train.get_title() == "train: 1,368 slices by class"
    assert test.get_title() == "test: 3 slices by class"
    assert [label.get_text() for label in train.get_yticklabels()] == [
        "glioma",
        "meningioma",
        "(no label)",
    ]
    assert _texts(train) == ["1,321", "40", "7"]
    assert _texts(test) == ["3", "0", "0"]


def test_a_distribution_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="all splits are empty"):
        class_distribution({"train": {}})


def test_a_class_has_one_colour_in_all_figures() -> None:
    bars = class_distribution({"train": dict.fromkeys(CLASSES, 5)}).axes[0].patches
    points = np.zeros((3, 2))
    maps = [_map(1, points, CLASSES, [0, 1, 2])]
    dots = embedding_maps(maps, CLASSES, 1).axes[0].collections[0].get_facecolor()
    expected = [colour.lower() for colour in class_colours(CLASSES).values()]
    assert len(set(expected)) == 3
    assert [to_hex(bar.get_facecolor()) for bar in bars] == expected
    assert [to_hex(colour) for colour in np.asarray(dots)] == expected


@pytest.mark.parametrize("num_samples", [1, 4, 7])
def test_every_pair_is_shown_one_above_the_other(num_samples: int) -> None:
    samples = [
        SlicePair(f"slice {i}", np.full((8, 8), i, np.uint8), np.full((6, 8), 100 + i, np.uint8))
        for i in range(num_samples)
    ]
    panels = [axes for axes in slice_pairs(samples, "", "before", "after").axes if axes.images]
    shown = {int(np.asarray(axes.images[0].get_array())[0, 0]): axes.get_title() for axes in panels}
    before = {i: f"slice {i}" for i in range(num_samples)}
    assert shown == before | {100 + i: "" for i in range(num_samples)}
    assert [axes.get_ylabel() for axes in panels if axes.get_ylabel()] == ["before", "after"] * (
        (num_samples + 4) // 5
    )


def test_curves_pass_through_the_logged_values() -> None:
    history = [
        {"epoch": 1.0, "train/loss/total": 3.0, "validation/head/accuracy": 0.5},
        {"epoch": 2.0, "train/loss/total": 2.0, "cluster/nmi_previous": 0.75},
    ]
    losses = loss_curves(history)
    accuracies = accuracy_curves(history, chosen_epoch=2)
    health = clustering_health(history, chosen_epoch=2)
    np.testing.assert_array_equal(_curve(losses, "total"), [[1, 3], [2, 2]])
    np.testing.assert_array_equal(_curve(accuracies, "validation"), [[1, 0.5]])
    chosen = [line for line in accuracies.axes[0].lines if line.get_label() == "chosen epoch (2)"]
    np.testing.assert_array_equal(chosen[0].get_xdata(), [2, 2])
    np.testing.assert_array_equal(_curve(health, "NMI with the previous epoch"), [[2, 0.75]])


def test_what_no_epoch_logged_is_left_out() -> None:
    health = clustering_health([{"epoch": 1.0, "cluster/silhouette": 0.5}], chosen_epoch=1)
    assert [axes.get_title() for axes in health.axes] == ["Silhouette (clean test)"]


def test_bars_of_an_epoch_add_up_to_its_seconds() -> None:
    history = [
        {"epoch": 1.0, "time/train_s": 10.0, "time/embed_s": 4.0, "time/report_s": 1.0},
        {"epoch": 2.0, "time/train_s": 8.0, "time/embed_s": 3.0},
    ]
    figure = timing_breakdown(history)
    tops: dict[float, float] = {}
    for bar in figure.axes[0].patches:
        epoch = bar.get_x() + bar.get_width() / 2  # type: ignore[attr-defined]
        top = bar.get_y() + bar.get_height()  # type: ignore[attr-defined]
        tops[epoch] = max(top, tops.get(epoch, 0.0))
    assert tops == pytest.approx({1.0: 15.0, 2.0: 11.0})
    assert [tick for tick in figure.axes[0].get_xticks() if 0.6 < tick < 2.4] == [1, 2]


def test_confusion_cells_hold_the_counts_and_shares_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    labels = generator.choice(CLASSES, size=200, p=[0.6, 0.3, 0.1]).tolist()
    predictions = generator.choice(CLASSES, size=200).tolist()
    counts = confusion_counts(labels, predictions, CLASSES)
    figure = confusion_matrices([Confusion("head", counts)], CLASSES, "all")
    expected = confusion_matrix(labels, predictions, labels=CLASSES)
    shares = confusion_matrix(labels, predictions, labels=CLASSES, normalize="true")
    shown = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert shown == {
        (column, row): f"{expected[row, column]}\n{shares[row, column]:.0%}"
        for row in range(3)
        for column in range(3)
    }
    np.testing.assert_allclose(np.asarray(figure.axes[0].images[0].get_array()), shares)


def test_a_class_without_slices_has_a_row_of_zeros() -> None:
    counts = confusion_counts(["glioma"], ["notumor"], CLASSES)
    np.testing.assert_array_equal(counts, [[0, 0, 1], [0, 0, 0], [0, 0, 0]])
    figure = confusion_matrices([Confusion("head", counts)], CLASSES, "all")
    assert _texts(figure.axes[0])[3:6] == ["0", "0", "0"]


def test_an_unknown_class_is_named() -> None:
    with pytest.raises(DataError, match=r"'gliom' is not a class of the run \(glioma, men"):
        confusion_counts(["gliom"], ["glioma"], CLASSES)


def test_maps_place_every_slice_and_number_every_cluster() -> None:
    points = np.array([[0.0, 0.0], [1.0, 0.0], [9.0, 9.0]])
    labels = ["glioma", "", "notumor"]
    maps = [_map(epoch, points + epoch, labels, [2, 2, 0]) for epoch in range(1, 7)]
    figure = embedding_maps(maps, CLASSES, 2)
    by_epoch = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(by_epoch) == [
        "epoch 1",
        "epoch 2 (chosen)",
        *(f"epoch {epoch}" for epoch in range(3, 7)),
    ]
    offsets = by_epoch["epoch 6"].collections[0].get_offsets()
    np.testing.assert_array_equal(np.asarray(offsets), points + 6)
    legends = [legend for axes in figure.axes if (legend := axes.get_legend()) is not None]
    assert [[text.get_text() for text in legend.get_texts()] for legend in legends] == [
        [*CLASSES, "(no label)"],
        ["cluster 0", "cluster 2"],
    ]
    below = figure.axes[3]  # in two bands of three
    positions = {text.get_text(): text.get_position() for text in below.texts}
    assert positions == {"0": (10.0, 10.0), "2": (1.5, 1.0)}


@pytest.mark.parametrize(("num_names", "num_legends"), [(30, 2), (300, 0)])
def test_maps_keep_their_size_beside_a_long_legend(num_names: int, num_legends: int) -> None:
    classes = [f"a class with a longer name, {number}" for number in range(num_names)]
    points = np.random.default_rng(0).normal(size=(num_names, 2))
    figure = embedding_maps([_map(1, points, classes, list(range(num_names)))], classes, 1)
    figure.draw_without_rendering()
    assert figure.axes[0].get_window_extent().width > 1.8 * figure.dpi
    legends = [legend for axes in figure.axes if (legend := axes.get_legend()) is not None]
    assert len(legends) == num_legends
    for legend in legends:
        assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_equal_figures_give_equal_png_of_readable_size() -> None:
    first, second = (png_bytes(class_distribution({"train": {"glioma": 2}})) for _ in range(2))
    assert first == second
    with Image.open(BytesIO(first)) as image:
        assert image.format == "PNG"
        assert 800 <= image.width <= 1600
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_every_subset_has_its_own_curve_of_accuracy() -> None:
    values = {"all": 0.9, "clean": 0.8, "strict": 0.7}
    names = {f"test/{subset}/head/accuracy": value for subset, value in values.items()}
    figure = accuracy_curves([{"epoch": 1.0} | names], chosen_epoch=1)
    for subset, value in values.items():
        np.testing.assert_array_equal(_curve(figure, f"test, {subset}"), [[1, value]])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["Accuracy of the head", "Accuracy of the clusters"]


def test_terms_of_the_loss_and_shares_of_clusters_are_labelled() -> None:
    history = [
        {"epoch": 1.0, "train/loss/cluster": 3.0, "train/loss/consistency": 2.0}
        | {"cluster/largest_share": 0.5, "cluster/smallest_share": 0.125}
    ]
    losses, health = loss_curves(history), clustering_health(history, chosen_epoch=1)
    clustering = _curve(losses, "clustering (unlabelled), without lambda")
    np.testing.assert_array_equal(clustering, [[1, 3]])
    np.testing.assert_array_equal(_curve(health, "largest cluster"), [[1, 0.5]])
    np.testing.assert_array_equal(_curve(health, "smallest cluster"), [[1, 0.125]])
    np.testing.assert_array_equal(_curve(health, "chosen epoch (1)")[:, 0], [1, 1])
