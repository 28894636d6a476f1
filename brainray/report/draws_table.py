"""Figures over draws of labels as Markdown."""

from collections.abc import Mapping

from brainray.report.comparison_table import interval, share
from brainray.report.table import markdown_table
from brainray.schema import SUBSETS

_PREDICTORS = ("head", "cluster", "thumbnail_1nn")
_MISSING = "–"


def draws_table(metrics: Mapping[str, float]) -> str:
    """Mean accuracy and deviation by predictor and test slices, beside the control's."""
    header = ["prediction", "test slices", "accuracy", "control", "difference", "fewer errors"]
    rows = []
    for predictor in _PREDICTORS:
        for subset in SUBSETS:
            name = f"test/{subset}/{predictor}/accuracy"
            if name not in metrics:
                continue
            rows.append(
                [
                    predictor,
                    subset,
                    mean_and_deviation(metrics, name),
                    _figure(metrics, f"control/{name}"),
                    interval(metrics, f"difference/{name}"),
                    share(metrics, f"fewer_errors/{name}"),
                ]
            )
    return markdown_table(header, rows, num_text_columns=2)


def mean_and_deviation(metrics: Mapping[str, float], name: str) -> str:
    """Such as ``0.930 ± 0.012``; a dash where there is no such figure."""
    if name not in metrics:
        return _MISSING
    deviation = metrics.get(f"{name}_std")
    return f"{metrics[name]:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def _figure(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.3f}" if name in metrics else _MISSING
