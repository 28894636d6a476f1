"""Figures over draws of labels as Markdown."""

from collections.abc import Mapping

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
                    _interval(metrics, f"difference/{name}"),
                    _share(metrics, f"fewer_errors/{name}"),
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


def _interval(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return _MISSING
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    text = f"{metrics[name]:+.3f}"
    return text if low is None or high is None else f"{text} [{low:+.3f}, {high:+.3f}]"


def _share(metrics: Mapping[str, float], name: str) -> str:
    return f"{100 * metrics[name]:.0f} %" if name in metrics else _MISSING
