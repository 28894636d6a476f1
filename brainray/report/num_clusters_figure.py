"""Figure of the criteria for the number of clusters, which need not agree."""

from matplotlib.figure import Figure

from brainray.clustering.num_clusters import NumClustersScores
from brainray.clustering.stability import Stability
from brainray.report.style import BLUE, GREY, new_figure, tidy


def num_clusters_figure(scores: NumClustersScores, stability: Stability) -> Figure:
    """Silhouette, BIC, gap and stability by K (the last two with standard errors); the K chosen by
    each is marked.

    For comparison, BIC and gap of a single cluster are hollow.
    """
    panels = {
        "silhouette": ("Silhouette (higher is better)", scores.silhouettes, None),
        "bic": ("BIC (lower is better)", scores.bic, None),
        "gap": ("Gap (first K not exceeded)", scores.gap, scores.gap_error),
        "stability": ("Stability (largest K near best)", stability.mean, stability.error),
    }
    choices = scores.chosen | {"stability": stability.chosen}
    scores_of_one_cluster = {"bic": scores.bic_of_one, "gap": scores.gap_of_one}
    figure = new_figure(13.0, 3.2)
    for axes, (name, (title, values, error)) in zip(
        figure.subplots(1, len(panels)), panels.items(), strict=True
    ):
        axes.errorbar(scores.num_clusters, values, yerr=error, color=BLUE, marker="o", capsize=3)
        if name in scores_of_one_cluster:
            axes.plot(1, scores_of_one_cluster[name], color=BLUE, marker="o", fillstyle="none")
        chosen = choices.get(name)
        if chosen is not None:
            axes.axvline(chosen, color=GREY, linestyle="--", label=f"K = {chosen}")
            axes.legend()
        axes.set_title(title)
        axes.set_xlabel("number of clusters K")
        axes.set_xticks([*([1] if name in scores_of_one_cluster else []), *scores.num_clusters])
        tidy(axes, grid="y")
    return figure
