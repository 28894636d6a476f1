"""Metrics over label draws as Markdown."""

from brainray.report.cells import PREDICTOR_TITLES, decimal, difference, mean_and_deviation, share
from brainray.report.table import markdown_table
from brainray.schema import SUBSETS, Metrics


def draws_table(metrics: Metrics) -> str:
    """Mean accuracy and deviation by predictor and test subset, next to the control's."""
    header = [
        "prediction",
        "test slices",
        "accuracy (mean ± standard deviation)",
        "control (mean)",
        "difference [95 %]",
        "fewer errors [95 %]",
    ]
    rows = []
    for predictor, title in PREDICTOR_TITLES.items():
        for subset in SUBSETS:
            name = f"test/{subset}/{predictor}/accuracy"
            if name not in metrics:
                continue
            rows.append(
                [
                    title,
                    subset,
                    mean_and_deviation(metrics, name),
                    decimal(metrics, f"control/{name}"),
                    difference(metrics, f"difference/{name}"),
                    share(metrics, f"fewer_errors/{name}"),
                ]
            )
    return markdown_table(header, rows, num_text_columns=2)
