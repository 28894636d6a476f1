"""Accuracies of predictions, and their intervals over groups of slices."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from sklearn import metrics as sk_metrics

from brainray.errors import DataError

CONFIDENCE = 0.95
"""Level of every reported interval."""

MIN_GROUPS = 10
"""Minimum number of groups of rows for an interval."""


def classification_metrics(
    labels: NDArray[np.integer],  # (N,) in [0, C)
    predictions: NDArray[np.integer],  # (N,)
    class_names: Sequence[str],
    min_support: int = 1,
) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro F1, and per class precision, recall, F1 and support.

    A class without labelled rows has no metrics and is excluded from the averages; one with fewer
    rows than `min_support` has only its support, and there are no averages over classes: it would
    count as much as the others. The precision of a class that is never predicted is 0.

    Raises:
        DataError: an unlabelled row, of label -1.
    """
    present = np.unique(labels)
    if present[0] < 0:
        raise DataError(f"{int((labels < 0).sum())} rows have no label: pass labelled rows only")
    precision, recall, f1, support = sk_metrics.precision_recall_fscore_support(
        labels, predictions, labels=present, zero_division=0
    )
    result = {"accuracy": float(np.mean(labels == predictions))}
    if support.min() >= min_support:
        result["balanced_accuracy"] = float(np.mean(recall))
        result["f1_macro"] = float(np.mean(f1))
    for i, class_index in enumerate(present):
        name = class_names[class_index]
        result[f"support/{name}"] = float(support[i])
        if support[i] >= min_support:
            result[f"precision/{name}"] = float(precision[i])
            result[f"recall/{name}"] = float(recall[i])
            result[f"f1/{name}"] = float(f1[i])
    return result


def bootstrap_interval(
    values: NDArray[Any],
    groups: Sequence[str] | NDArray[np.str_],
    seed: int,
    num_resamples: int = 1000,
    weights: NDArray[Any] | None = None,
) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean, or of sum(values) / sum(weights), over whole groups of
    rows; None if it would mislead.

    Rows of one group, such as a subject's, are not independent, so groups are drawn with
    replacement (Davison & Hinkley 1997, section 3.8). Percentiles of the resampled means (Efron
    1979) are too narrow for few groups; they are expanded by the ratio of Student's t to the normal
    distribution (Hesterberg 2015, "What Teachers Should Know About the Bootstrap"), with the
    effective number of groups if their sizes, or weights, differ (Kish 1965). Without variation
    between groups, or with fewer than `MIN_GROUPS` groups of some weight, there is no interval. If
    a few groups hold nearly all rows, the interval approaches the range of the resamples.

    Args:
        values: (N,), such as the gain of one classifier over another.
        groups: (N,) group of each row; a row without a group needs one of its own.
        seed: of the resamples.
        num_resamples: number of resamples.
        weights: (N,), at least 0, such as the errors that the other classifier makes; 1 if None.
    """
    resampled = _resample_groups(values, groups, seed, num_resamples, weights)
    if resampled is None:
        return None
    means, num_effective = resampled
    t = stats.t.ppf((1 + CONFIDENCE) / 2, num_effective - 1)
    tail = stats.norm.sf(t * np.sqrt(num_effective / (num_effective - 1)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def accuracy_interval(
    is_right: NDArray[np.bool_],
    groups: Sequence[str] | NDArray[np.str_],
    seed: int,
    num_resamples: int = 1000,
) -> tuple[float, float] | None:
    """95 % interval of an accuracy, over whole groups of rows; None if it would mislead.

    The logit of the accuracy, plus and minus Student's t times its standard error, as for
    proportions in surveys of clusters (among the intervals compared by Korn & Graubard 1998,
    "Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data"). The error is that of the resamples of `bootstrap_interval`, whose
    percentiles would be too high near an accuracy of 1: lower accuracies vary more.

    Args:
        is_right: (N,).
        groups: as in `bootstrap_interval`, like the other arguments.
        seed: of the resamples.
        num_resamples: number of resamples.
    """
    resampled = _resample_groups(is_right, groups, seed, num_resamples)
    if resampled is None:
        return None
    means, num_effective = resampled
    accuracy = float(np.mean(is_right))
    error = means.std(ddof=1) * np.sqrt(num_effective / (num_effective - 1))
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, num_effective - 1) * error
    reach /= accuracy * (1 - accuracy)  # the derivative of the logit
    low, high = special.expit(special.logit(accuracy) + np.array([-reach, reach]))
    return float(low), float(high)


def _resample_groups(
    values: NDArray[Any],
    groups: Sequence[str] | NDArray[np.str_],
    seed: int,
    num_resamples: int,
    weights: NDArray[Any] | None = None,
) -> tuple[NDArray[np.float64], float] | None:
    """Means of resampled groups (up to num_resamples,) and the effective number of groups; None
    with fewer than `MIN_GROUPS` groups of some weight or without variation between groups.
    """
    _, group_of_row = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    sizes = np.bincount(group_of_row, weights)
    if np.count_nonzero(sizes) < MIN_GROUPS:
        return None
    sums = np.bincount(group_of_row, values)
    if np.abs(sums - sums.sum() / sizes.sum() * sizes).max() <= 1e-9:
        return None
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(num_resamples):
        drawn = generator.integers(len(sizes), size=len(sizes))
        if size := sizes[drawn].sum():  # 0 in one of 22,000 resamples, or fewer
            means.append(sums[drawn].sum() / size)
    return np.array(means), float(sizes.sum() ** 2 / (sizes**2).sum())


def reweighted_accuracy(
    labels: NDArray[np.integer],  # (N,) in [0, C)
    predictions: NDArray[np.integer],  # (N,)
    class_mix: NDArray[np.number],  # (C,) shares or counts
) -> float:
    """Accuracy reweighted to the class proportions of `class_mix`, whose classes all have rows."""
    support = np.bincount(labels, minlength=len(class_mix))
    weights = class_mix / np.maximum(support, 1)
    return float(np.average(labels == predictions, weights=weights[labels]))
