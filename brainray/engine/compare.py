"""Paired comparison of runs with their controls on the same test slices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import stats

from brainray.engine.accuracy import bootstrap_interval
from brainray.engine.evaluate import labelled_rows, resampling_groups
from brainray.errors import DataError
from brainray.schema import CLASS_COLUMNS, Metrics, subset_masks

_COMPARED = ("difference/", "fewer_errors/", "only_run/", "only_control/", "p/")


@dataclass(frozen=True)
class PairedDifference:
    """Difference in accuracy between two classifiers on the same rows."""

    value: float  # accuracy of the first minus accuracy of the second
    fewer_errors: float | None  # relative reduction of the second's errors; None if it has none
    intervals: Mapping[str, tuple[float, float]]  # 95 %, of ``difference`` and ``fewer_errors``
    only_one: int  # rows that only the first classifies correctly
    only_other: int
    p_value: float


def paired_difference(
    correct: NDArray[np.bool_],
    other_correct: NDArray[np.bool_],
    groups: Sequence[str] | NDArray[np.str_],
    *,
    num_resamples: int,
    seed: int,
) -> PairedDifference:
    """Difference in accuracy between two classifiers, with its interval and p value.

    The intervals are those of `bootstrap_interval`, which resamples whole groups of rows. In
    ``fewer_errors`` = (errors of the second - errors of the first) / errors of the second, both
    parts are resampled. The p value is that of McNemar's exact test (1947), which assumes
    independent rows.

    Args:
        correct: (N,) whether the first classifier is right.
        other_correct: (N,) whether the second one is.
        groups: (N,) group of each row, such as its subject.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    gains = correct.astype(np.int64) - other_correct
    num_errors = int((~other_correct).sum())
    only_one, only_other = int((gains > 0).sum()), int((gains < 0).sum())
    discordant = only_one + only_other
    return PairedDifference(
        value=float(gains.mean()),
        fewer_errors=float(gains.sum() / num_errors) if num_errors else None,
        intervals=_intervals(gains, ~other_correct, groups, num_resamples, seed),
        only_one=only_one,
        only_other=only_other,
        p_value=float(stats.binomtest(only_one, discordant).pvalue) if discordant else 1.0,
    )


def compare(
    predictions: pa.Table,
    control: pa.Table,
    group_of_slice: Mapping[str, str],
    *,
    num_resamples: int,
    seed: int,
) -> Metrics:
    """Compare a run's predictions with those of its control, for each subset and predictor.

    For every accuracy NAME, such as ``test/clean/head/accuracy``: ``difference/NAME`` with its 95 %
    interval (``_low``, ``_high``), ``fewer_errors/NAME`` with its own, ``only_run/NAME`` and
    ``only_control/NAME`` (slices that only one of the two classifies correctly), and ``p/NAME``.

    Args:
        predictions: ``PREDICTIONS`` rows; unlabelled rows are ignored.
        control: rows of the control for the same slices in the same order.
        group_of_slice: by sample_id, the group that is resampled as a whole for the intervals; a
            slice without an entry is its own group.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: the two predict different slices.
    """
    _check_same_slices(predictions, control)
    predictions, control = labelled_rows(predictions), labelled_rows(control)
    groups = resampling_groups(predictions, group_of_slice)
    metrics: Metrics = {}
    for name, mask, column in _accuracies(predictions):
        found = paired_difference(
            _is_right(predictions, column)[mask],
            _is_right(control, column)[mask],
            groups[mask],
            num_resamples=num_resamples,
            seed=seed,
        )
        metrics |= {
            f"difference/{name}": found.value,
            f"only_run/{name}": float(found.only_one),
            f"only_control/{name}": float(found.only_other),
            f"p/{name}": found.p_value,
        }
        if found.fewer_errors is not None:
            metrics[f"fewer_errors/{name}"] = found.fewer_errors
        for kind, (low, high) in found.intervals.items():
            metrics |= {f"{kind}/{name}_low": low, f"{kind}/{name}_high": high}
    return metrics


def intervals_of_mean_gains(
    predictions: Sequence[pa.Table],
    controls: Sequence[pa.Table],
    group_of_slice: Mapping[str, str],
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """Intervals (`bootstrap_interval`) of the mean gain of several runs, ``difference/NAME`` for an
    accuracy NAME, and of its ratio to the controls' mean errors, ``fewer_errors/NAME``.

    Args:
        predictions: ``PREDICTIONS`` rows of every run, whose subsets are those of the first;
            unlabelled rows are ignored.
        controls: rows of each run's control, all for the same slices in the same order.
        group_of_slice: as for `compare`.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: two of them predict different slices.
    """
    for each in (*predictions, *controls):
        _check_same_slices(predictions[0], each)
    ours, theirs = ([labelled_rows(each) for each in side] for side in (predictions, controls))
    groups = resampling_groups(ours[0], group_of_slice)
    intervals: dict[str, tuple[float, float]] = {}
    for name, mask, column in _accuracies(ours[0]):
        right, other_right = (
            np.mean([_is_right(each, column)[mask] for each in side], axis=0)
            for side in (ours, theirs)
        )
        gains, errors = right - other_right, 1 - other_right
        found = _intervals(gains, errors, groups[mask], num_resamples, seed)
        intervals |= {f"{kind}/{name}": interval for kind, interval in found.items()}
    return intervals


def without_comparison(metrics: Metrics) -> Metrics:
    """The metrics without those added by `compare`."""
    return {name: value for name, value in metrics.items() if not name.startswith(_COMPARED)}


def _intervals(
    gains: NDArray[Any],  # (N,)
    errors: NDArray[Any],  # (N,), of the control
    groups: Sequence[str] | NDArray[np.str_],
    num_resamples: int,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """Those of ``difference``, the mean gain, and ``fewer_errors``, gains / errors, that exist."""
    found = {
        "difference": bootstrap_interval(gains, groups, seed, num_resamples),
        "fewer_errors": bootstrap_interval(gains, groups, seed, num_resamples, errors),
    }
    return {kind: interval for kind, interval in found.items() if interval is not None}


def _check_same_slices(predictions: pa.Table, control: pa.Table) -> None:
    if not predictions["sample_id"].equals(control["sample_id"]):
        raise DataError(
            "the control predicts different test slices: compare runs on the same image store"
        )


def _accuracies(predictions: pa.Table) -> Iterator[tuple[str, NDArray[np.bool_], str]]:
    """Name, mask (N,) of the slices and column of every accuracy in the predictions."""
    for subset, mask in subset_masks(predictions).items():
        if mask.any():
            for predictor, column in CLASS_COLUMNS.items():
                yield f"test/{subset}/{predictor}/accuracy", mask, column


def _is_right(predictions: pa.Table, column: str) -> NDArray[np.bool_]:
    """(N,) whether the class in a column is the label."""
    return np.asarray(pc.equal(predictions[column], predictions["label"]).to_numpy(), np.bool_)
