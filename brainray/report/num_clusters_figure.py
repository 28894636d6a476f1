"""Figure of three criteria for the number of clusters, which need not agree."""

from matplotlib.figure import Figure

from brainray.clustering.num_clusters import NumClustersScores
from brainray.report.style import BLUE, GREY, new_figure, tidy


def num_clusters_figure(scores: NumClustersScores) -> Figure:
    """Silhouette, BIC and gap (with standard error) by K; the K chosen by each is marked."""
    panels = {
        "silhouette": ("Silhouette (higher is better)", scores.silhouettes, None),
        "bic": ("BIC (lower is better)", scores.bic, None),
        "gap": ("Gap (first K not exceeded)", scores.gap, scores.gap_error),
    }
    figure = new_figure(10.0, 3.2)
    for axes, (name, (title, values, error)) in zip(
        figure.subplots(1, len(panels)), panels.items(), strict=True
    ):
        axes.errorbar(scores.num_clusters, values, yerr=error, color=BLUE, marker="o", capsize=3)
        chosen = scores.chosen.get(name)
        if chosen is not None:
            axes.axvline(chosen, color=GREY, linestyle="--", label=f"K = {chosen}")
            axes.legend()
        axes.set_title(title)
        axes.set_xlabel("number of clusters K")
        axes.set_xticks(scores.num_clusters)
        tidy(axes, grid="y")
    return figure
