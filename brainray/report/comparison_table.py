"""Paired comparison of a run with its control, as Markdown and for the run's report."""

from brainray.report.cells import PREDICTOR_TITLES, difference, share
from brainray.report.table import markdown_table
from brainray.schema import PREDICTED_BY, SUBSETS, Metrics

COMPARISON_COLUMNS = [
    "prediction",
    "test slices",
    "difference of these two trainings [95 %, over copies and subjects]",
    "fewer errors",
    "right where exactly one is",
    "McNemar's p, as if slices were independent",
]


def comparison_table(metrics: Metrics) -> str:
    """Markdown table of the metrics returned by `engine.compare`."""
    return markdown_table(COMPARISON_COLUMNS, comparison_rows(metrics), num_text_columns=2)


def comparison_rows(metrics: Metrics) -> list[list[str]]:
    """One row per compared predictor and subset; none without a control."""
    return [
        [
            PREDICTOR_TITLES[predictor],
            subset,
            *_cells(metrics, f"test/{subset}/{predictor}/accuracy"),
        ]
        for predictor in PREDICTED_BY
        for subset in SUBSETS
        if f"p/test/{subset}/{predictor}/accuracy" in metrics
    ]


def _cells(metrics: Metrics, name: str) -> list[str]:
    wins, losses = (metrics[f"{whose}/{name}"] for whose in ("only_run", "only_control"))
    return [
        difference(metrics, f"difference/{name}"),
        share(metrics, f"fewer_errors/{name}"),
        f"{wins:,.0f} of {wins + losses:,.0f}",
        f"{metrics[f'p/{name}']:.2g}",
    ]
