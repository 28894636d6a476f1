"""Paired comparison of runs with their controls on the same test slices."""

from collections.abc import Iterator, Mapping, Sequence

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


def paired_difference(
    correct: NDArray[np.bool_],  # (N,) whether the run is right
    other_correct: NDArray[np.bool_],  # (N,) whether its control is
) -> dict[str, float]:
    """Difference in accuracy between a run and its control on the same rows.

    ``difference``; ``only_run`` and ``only_control``, the rows that only one classifies correctly;
    ``p`` of McNemar's exact test (1947), which assumes independent rows; and ``fewer_errors``, the
    share of the control's errors that the run avoids on balance, if the control makes any.
    """
    only_run = int((correct & ~other_correct).sum())
    only_control = int((other_correct & ~correct).sum())
    gain, discordant = only_run - only_control, only_run + only_control
    found = {
        "difference": gain / len(correct),
        "only_run": float(only_run),
        "only_control": float(only_control),
        "p": float(stats.binomtest(only_run, discordant).pvalue) if discordant else 1.0,
    }
    num_errors = int((~other_correct).sum())
    return found | {"fewer_errors": gain / num_errors} if num_errors else found


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
    intervals = intervals_of_mean_gains(
        [predictions], [control], group_of_slice, num_resamples=num_resamples, seed=seed
    )
    metrics: Metrics = {}
    for key, (low, high) in intervals.items():
        metrics |= {f"{key}_low": low, f"{key}_high": high}
    predictions, control = labelled_rows(predictions), labelled_rows(control)
    for name, mask, column in _accuracies(predictions):
        found = paired_difference(
            _is_right(predictions, column)[mask], _is_right(control, column)[mask]
        )
        metrics |= {f"{kind}/{name}": value for kind, value in found.items()}
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
        gains = right - other_right
        for kind, weights in (("difference", None), ("fewer_errors", 1 - other_right)):
            found = bootstrap_interval(gains, groups[mask], seed, num_resamples, weights)
            if found is not None:
                intervals[f"{kind}/{name}"] = found
    return intervals


def without_comparison(metrics: Metrics) -> Metrics:
    """The metrics without those added by `compare`."""
    return {name: value for name, value in metrics.items() if not name.startswith(_COMPARED)}


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
