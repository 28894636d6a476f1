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
    for accuracies also ``fewer_errors/NAME``, the relative reduction of the control's mean error,
    and 95 % intervals of both (``_low``, ``_high``). What compares other slices is left out.

    A difference depends on the labels drawn and on the test subjects. The interval covers both:
    Student's t over draws and `intervals_of_mean_gains` over subjects are combined in quadrature
    (Zou & Donner 2008, "Construction of confidence limits about effect measures: a general
    approach"). There is no interval with one draw or without an interval over subjects.

    The reduction of errors is R = sum g_d / sum e_d, with the gain g_d and the control's error e_d
    of draw d = 1..D. To first order, its standard error over draws is
    sd(g_d - R e_d) / (mean(e_d) sqrt(D)) (Cochran 1977, "Sampling Techniques", theorem 2.5).

    Args:
        draws: metrics of each draw's run.
        control: metrics of the control's run for each draw.
        intervals: `intervals_of_mean_gains` of the same runs.
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
        metrics[f"control/{name}"] = float(others.mean())
        if len(draws) > 1:
            metrics[f"control/{name}_std"] = float(others.std(ddof=1))
        parts = {"difference": np.ones(len(draws))}
        if name.endswith("/accuracy") and others.mean() < 1:
            parts["fewer_errors"] = 1 - others
        for kind, weights in parts.items():
            key = f"{kind}/{name}"
            metrics |= _ratio(key, values - others, weights, (intervals or {}).get(key))
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
    pairs = list(zip(draws, control, strict=False))
    if pairs and all(
        name in other and _is_of_one_subset(name, [draw, other]) for draw, other in pairs
    ):
        return np.array([other[name] for other in control])
    return None


def _is_of_one_subset(name: str, runs: Sequence[Metrics]) -> bool:
    """Whether the metric is of as many slices in all runs: another version may find other ones."""
    subset = name.split("/")[1].removeprefix("all_as_")
    return len({run.get(f"test/{subset}/num_slices") for run in runs}) == 1


def _ratio(
    name: str,
    gains: NDArray[np.float64],  # (D,)
    weights: NDArray[np.float64],  # (D,)
    of_subjects: tuple[float, float] | None,
) -> Metrics:
    """Mean gain by mean weight, with limits for both new label draws and new subjects."""
    ratio = gains.mean() / weights.mean()
    metrics = {name: float(ratio)}
    if len(gains) > 1 and of_subjects is not None:
        low, high = of_subjects
        error = (gains - ratio * weights).std(ddof=1) / weights.mean() / math.sqrt(len(gains))
        half = stats.t.ppf((1 + CONFIDENCE) / 2, len(gains) - 1) * error
        metrics[f"{name}_low"] = float(ratio - math.hypot(half, ratio - low))
        # A gain cannot be larger than the error that was left.
        metrics[f"{name}_high"] = float(min(ratio + math.hypot(half, high - ratio), 1))
    return metrics


def _common_names(runs: Sequence[Metrics]) -> set[str]:
    names = set.intersection(*(set(run) for run in runs))
    tested = {name for name in names if name.startswith("test/") and _is_of_one_subset(name, runs)}
    # Interval limits of single runs: their means are not limits.
    accuracies = [name for name in tested if name.endswith("/accuracy")]
    return tested - {f"{name}{bound}" for name in accuracies for bound in ("_low", "_high")}
