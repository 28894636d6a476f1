import numpy as np

from brainray.clustering.num_clusters import NumClustersScores
from brainray.clustering.stability import Stability
from brainray.report.num_clusters_figure import num_clusters_figure


def test_each_criterion_marks_its_own_choice() -> None:
    scores = NumClustersScores(
        [2, 3, 4],
        [0.4, 0.6, 0.5],
        [120.0, 100.0, 90.0],
        [0.5, 0.9, 0.8],
        [0.01, 0.02, 0.02],
        bic_of_one=150.0,
        gap_of_one=0.1,
    )
    assert scores.chosen == {"silhouette": 3, "bic": 4, "gap": 3}
    stability = Stability([2, 3, 4], [0.9, 0.85, 0.5], [0.01, 0.1, 0.1])
    assert stability.chosen == 2
    panels = num_clusters_figure(scores, stability).axes
    marked = [axes.get_legend_handles_labels()[1] for axes in panels]
    assert marked == [["K = 3"], ["K = 4"], ["K = 3"], ["K = 2"]]
    drawn = [[np.asarray(line.get_ydata()).tolist() for line in axes.lines] for axes in panels]
    assert drawn[0][0] == scores.silhouettes
    assert [values for values in drawn[1] if values[0] >= 1][:2] == [scores.bic, [150.0]]
    assert [values for values in drawn[2] if values in (scores.gap, [0.1])] == [scores.gap, [0.1]]
    assert drawn[3][0] == stability.mean
