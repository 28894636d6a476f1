"""A study's figures show the values that they were given."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from brainray.report.study_figures import (
    ClusterTiles,
    Varied,
    cluster_map,
    cluster_sheet,
    explained_variance,
    k_distance_curve,
    refinement,
    sensitivity,
)
from brainray.report.style import GREY, cluster_colour
from brainray.schema import NOISE


def _points(axes: Axes, label: str) -> list[tuple[float, float]]:
    """Of the only line with that label."""
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return _xy(line)


def _xy(line: Line2D) -> list[tuple[float, float]]:
    return [tuple(point) for point in np.asarray(line.get_xydata()).tolist()]


def test_explained_variance_adds_up() -> None:
    (axes,) = explained_variance({"pixels": np.array([0.5, 0.25, 0.125])}).axes
    assert _points(axes, "pixels") == [(1, 0.5), (2, 0.75), (3, 0.875)]


def test_the_distance_at_the_knee_is_marked() -> None:
    (axes,) = k_distance_curve(np.array([0.1, 0.2, 0.3, 2.5]), knee=2, k=1).axes
    heights = [height for _, height in _points(axes, "eps = 0.3")]
    assert heights == [0.3, 0.3]
    assert axes.get_ylabel() == "distance to neighbour 1"


def test_what_a_setting_lacks_leaves_a_gap_at_its_place() -> None:
    panel = Varied("K", ["2", "3", "4"], {"nmi": [(0.5, 0.1), None, (0.7, 0.0)], "ari": [None] * 3})
    (axes,) = sensitivity([panel]).axes
    assert axes.get_legend_handles_labels()[1] == ["nmi"]
    assert _xy(axes.lines[0]) == [(0, 0.5), (2, 0.7)]


def test_changes_and_agreement_of_a_refinement_are_panels_of_their_own() -> None:
    rounds = [{"round": 0.0, "nmi": 0.25}, {"round": 1.0, "nmi": 0.5, "changed_share": 0.125}]
    changed, agreement = refinement({"refined": rounds}, tolerance=0.01).axes
    assert _points(changed, "refined") == [(1, 0.125)]
    assert _points(agreement, "refined") == [(0, 0.25), (1, 0.5)]
    assert [height for _, height in _points(changed, "tolerance")] == [0.01, 0.01]
    assert changed.get_ylabel() == "share of slices that changed cluster"


@pytest.mark.parametrize(("labels", "num_panels"), [(["_a", "", "b"], 2), ([""] * 3, 1)])
def test_noise_is_grey_and_slices_without_a_label_are_named(
    labels: list[str], num_panels: int
) -> None:
    points = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    figure = cluster_map(points, np.array([NOISE, 1, 1]), labels, "title")
    assert len(figure.axes) == num_panels
    noise, cluster = figure.axes[0].collections
    assert (noise.get_label(), cluster.get_label()) == ("noise", "1")
    assert [to_hex(np.asarray(each.get_facecolor())[0]).upper() for each in (noise, cluster)] == [
        GREY.upper(),
        cluster_colour(1).upper(),
    ]
    np.testing.assert_array_equal(np.asarray(noise.get_offsets()), points[:1])
    if num_panels == 2:
        shown = {
            str(each.get_label()): np.asarray(each.get_offsets()).tolist()
            for each in figure.axes[1].collections
        }
        assert shown == {"_a": [[0, 0]], "b": [[2, 2]], "(no label)": [[1, 1]]}
        legend = figure.axes[1].get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == ["_a", "b", "(no label)"]


def test_the_slices_nearest_to_a_centroid_are_left_of_the_farthest() -> None:
    grey = [np.full((8, 8), value, np.uint8) for value in (10, 20, 200)]
    rows = [
        ClusterTiles("cluster 0", grey[:2], grey[2:]),
        ClusterTiles("noise", grey[:1], grey[1:2]),
    ]
    pictures = [
        np.asarray(axes.images[0].get_array()) for axes in cluster_sheet(rows, "pixels").axes
    ]
    assert pictures[0][40, [40, 120, 170, 220]].tolist() == [10, 20, 255, 200]
    assert pictures[1][40, [40, 120, 170, 220]].tolist() == [10, 255, 255, 20]
