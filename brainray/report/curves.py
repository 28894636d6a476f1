"""Curves by epoch: which metrics are drawn together, and how; for figures and the HTML report."""

from dataclasses import dataclass

from brainray.report.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION


@dataclass(frozen=True)
class Curve:
    """A metric by epoch."""

    metric: str
    label: str
    colour: str
    line: str = "-"  # as in matplotlib


LOSSES = (
    Curve("train/loss/total", "total", BLACK),
    Curve("train/loss/ce", "cross entropy (labelled)", BLUE, "--"),
    Curve("train/loss/cluster", "clustering (unlabelled), without lambda", VERMILLION, "-."),
    Curve("train/loss/consistency", "consistency (unlabelled), without lambda", GREEN, ":"),
    Curve("train/loss/anchor", "anchors (labelled), without lambda", PURPLE, "--"),
)
ACCURACIES = {
    predictor: (
        Curve(f"validation/{predictor}/accuracy", "validation", GREY, "--"),
        Curve(f"test/all/{predictor}/accuracy", "test, all", BLUE),
        Curve(f"test/clean/{predictor}/accuracy", "test, clean", VERMILLION, "-."),
        Curve(f"test/strict/{predictor}/accuracy", "test, strict", GREEN, ":"),
    )
    for predictor in ("head", "cluster")
}
AGREEMENT = (
    Curve("cluster/nmi_previous", "NMI with the previous epoch", BLUE),
    Curve("cluster/nmi", "NMI with the classes (clean test)", VERMILLION, "--"),
)
SILHOUETTE = (Curve("cluster/silhouette", "silhouette (clean test)", GREEN, ":"),)
EFFECTIVE_RANK = (Curve("cluster/effective_rank", "effective rank", PURPLE),)
SHARES = (
    Curve("cluster/largest_share", "largest cluster", ORANGE),
    Curve("cluster/smallest_share", "smallest cluster", SKY, "--"),
)
