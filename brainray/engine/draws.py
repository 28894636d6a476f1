"""Metrics over several label draws: means, deviations and paired differences to a control."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from brainray.engine.accuracy import CONFIDENCE
from brainray.schema import Metrics


def summarise_draws(
    draws: Sequence[Metrics],
    control: Sequence[Metrics] | None = None,
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> Metrics:
    """Summarise the test metrics of one run per label draw.

    For every ``test/...`` metric that all draws have: its mean under its own name, and the sample
    standard deviation as ``NAME_std``. With a control, whose runs use the same labels draw by draw:
    its mean and deviation as ``control/NAME``, the mean paired difference as ``difference/NAME``;
    for accuracies also a 95 % interval (``_low``, ``_high``) and ``fewer_errors/NAME``, the
    relative reduction of the control's mean error. What compares other slices is left out.

    A difference depends on the labels drawn and on the test subjects. The interval covers both:
    Student's t over draws and `intervals_of_mean_gains` over subjects are combined in quadrature
    (Zou & Donner 2008, "Construction of confidence limits about effect measures: a general
    approach"). There is no interval with one draw or without an interval over subjects.

    Args:
        draws: metrics of each draw's run.
        control: metrics of the control's run for each draw.
        intervals: `intervals_of_mean_gains` of the same runs, by name of the accuracy.
    """
    metrics: Metrics = {"num_label_draws": float(len(draws))}
    for name in sorted(_common_names(draws)):
        values = np.array([draw[name] for draw in draws])
        metrics[name] = float(values.mean())
        if len(draws) > 1:
            metrics[f"{name}_std"] = float(values.std(ddof=1))
        others = _values_of_control(name, draws, control or [])
        if others is None:
            continue
        differences = values - others
        metrics[f"control/{name}"] = float(others.mean())
        metrics[f"difference/{name}"] = float(differences.mean())
        if len(draws) > 1:
            metrics[f"control/{name}_std"] = float(others.std(ddof=1))
            if intervals is not None and name in intervals:
                low, high = _of_both(differences, *intervals[name])
                metrics[f"difference/{name}_low"] = low
                metrics[f"difference/{name}_high"] = high
        if name.endswith("/accuracy") and others.mean() < 1:
            spared = (values.mean() - others.mean()) / (1 - others.mean())
            metrics[f"fewer_errors/{name}"] = float(spared)
    return metrics


def _values_of_control(
    name: str, draws: Sequence[Metrics], control: Sequence[Metrics]
) -> NDArray[np.float64] | None:
    """The control's metric (D,) on the slices of each draw's subset; None if it is unknown.

    A control whose starting weights have seen other slices has other ones in its subsets. Of these
    only the accuracies are known, from the differences of each draw.
    """
    if control and all(f"difference/{name}" in draw for draw in draws):
        return np.array([draw[name] - draw[f"difference/{name}"] for draw in draws])
    subset = name.split("/")[1].removeprefix("all_as_")
    size = f"test/{subset}/num_slices"
    pairs = list(zip(draws, control, strict=False))
    if pairs and all(name in other and other.get(size) == draw.get(size) for draw, other in pairs):
        return np.array([other[name] for other in control])
    return None


def _of_both(differences: NDArray[np.float64], low: float, high: float) -> tuple[float, float]:
    """Limits that cover both new label draws (from D differences) and new subjects (low, high)."""
    mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) * error
    limits = mean - math.hypot(half, mean - low), mean + math.hypot(half, high - mean)
    return float(limits[0]), float(limits[1])


def _common_names(runs: Sequence[Metrics]) -> set[str]:
    names = set.intersection(*(set(run) for run in runs))
    tested = {name for name in names if name.startswith("test/")}
    # Interval limits of single runs: their means are not limits.
    accuracies = [name for name in tested if name.endswith("/accuracy")]
    return tested - {f"{name}{bound}" for name in accuracies for bound in ("_low", "_high")}
