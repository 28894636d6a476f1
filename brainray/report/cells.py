"""Metrics formatted as table cells, with a dash for a missing value."""

from math import isnan

from brainray.schema import PREDICTORS, Metrics

MISSING = "–"

PREDICTOR_TITLES = dict(zip(PREDICTORS, ("head", "clusters", "nearest thumbnail"), strict=True))


def decimal(metrics: Metrics, name: str) -> str:
    """For example ``0.924``."""
    value = metrics.get(name)
    return MISSING if value is None or isnan(value) else f"{value:.3f}"


def count(metrics: Metrics, name: str) -> str:
    """For example ``1,221``."""
    value = metrics.get(name)
    return MISSING if value is None else f"{value:,.0f}"


def share(metrics: Metrics, name: str) -> str:
    """For example ``17 % [3, 29]``; without the interval if it is missing."""
    values = [metrics.get(key) for key in (name, f"{name}_low", f"{name}_high")]
    value, low, high = (
        MISSING if value is None or isnan(value) else f"{round(100 * value)}" for value in values
    )
    if value == MISSING:
        return MISSING
    return f"{value} %" if MISSING in (low, high) else f"{value} % [{low}, {high}]"


def with_interval(metrics: Metrics, name: str) -> str:
    """For example ``0.924 [0.909, 0.939]``; without the interval if it is missing."""
    low, high = (decimal(metrics, f"{name}_{side}") for side in ("low", "high"))
    value = decimal(metrics, name)
    return value if MISSING in (low, high) else f"{value} [{low}, {high}]"


def difference(metrics: Metrics, name: str) -> str:
    """For example ``+0.016 [+0.002, +0.029]``; without the interval if it is missing."""
    values = [metrics.get(key) for key in (name, f"{name}_low", f"{name}_high")]
    value, low, high = (MISSING if value is None else f"{value:+.3f}" for value in values)
    return value if MISSING in (low, high) else f"{value} [{low}, {high}]"


def mean_and_deviation(metrics: Metrics, name: str) -> str:
    """For example ``0.930 ± 0.012``; without the deviation if it is missing."""
    deviation = decimal(metrics, f"{name}_std")
    value = decimal(metrics, name)
    return value if deviation == MISSING else f"{value} ± {deviation}"
