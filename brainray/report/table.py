"""The reported figures as Markdown that also reads well as plain text."""

from collections.abc import Mapping, Sequence

from brainray.report.cells import MISSING, count, figure, with_interval
from brainray.schema import PREDICTORS, SUBSETS

_AVERAGES = ("balanced_accuracy", "f1_macro")
_BY_CLASS = ("precision", "recall", "f1")
_OF_CLUSTERS = {"silhouette": "silhouette", "nmi": "NMI", "ari": "ARI", "fmi": "FMI"}


def results_table(metrics: Mapping[str, float], classes: Sequence[str]) -> str:
    """Test figures from flat metrics, for all, clean and strict slices; a dash where there is none.

    First each predictor's accuracy (with its interval), balanced accuracy and macro F1, and its
    accuracy over all slices re-weighted to the class mix of clean; then precision, recall and F1
    by class; then the clusters' own figures.
    """
    sizes = ", ".join(f"{count(metrics, f'test/{s}/num_slices')} {s}" for s in SUBSETS)
    return "\n\n".join(
        [
            f"Test slices: {sizes}. In brackets: 95 % intervals, over subjects where known.",
            _predictor_table(metrics),
            _class_table(metrics, classes),
            _cluster_line(metrics),
        ]
    )


def _predictor_table(metrics: Mapping[str, float]) -> str:
    header = ["prediction", "test slices", "accuracy", "balanced accuracy", "macro F1"]
    rows = []
    for predictor in PREDICTORS:
        for subset in SUBSETS:
            prefix = f"test/{subset}/{predictor}"
            averages = [figure(metrics, f"{prefix}/{name}") for name in _AVERAGES]
            rows.append(
                [predictor, subset, with_interval(metrics, f"{prefix}/accuracy"), *averages]
            )
        reweighted = with_interval(metrics, f"test/all_as_clean/{predictor}/accuracy")
        rows.append([predictor, "all at clean's class mix", reweighted, MISSING, MISSING])
    return markdown_table(header, rows, num_text_columns=2)


def _class_table(metrics: Mapping[str, float], classes: Sequence[str]) -> str:
    header = ["test slices", "class", "slices"]
    header += [f"{p} {name}" for p in ("head", "cluster") for name in ("precision", "recall", "F1")]
    rows = []
    for subset in SUBSETS:
        for name in classes:
            row = [subset, name, count(metrics, f"test/{subset}/head/support/{name}")]
            for predictor in ("head", "cluster"):
                row += [
                    figure(metrics, f"test/{subset}/{predictor}/{kind}/{name}")
                    for kind in _BY_CLASS
                ]
            rows.append(row)
    return markdown_table(header, rows, num_text_columns=2)


def _cluster_line(metrics: Mapping[str, float]) -> str:
    parts = []
    for subset in SUBSETS:
        figures = [
            f"{label} {figure(metrics, f'test/{subset}/cluster/{name}')}"
            for name, label in _OF_CLUSTERS.items()
        ]
        parts.append(f"{subset}: {', '.join(figures)}")
    return f"Clusters, {'; '.join(parts)}."


def markdown_table(header: list[str], rows: list[list[str]], *, num_text_columns: int) -> str:
    """Columns padded to their widest cell: text to the left, figures to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]

    def line(row: list[str]) -> str:
        padded = [
            cell.ljust(width) if i < num_text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if i < num_text_columns else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])
