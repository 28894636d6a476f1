"""Paired differences between a run and its control."""

import numpy as np
import pyarrow as pa
import pytest

from brainray.engine.compare import compare, paired_difference
from brainray.errors import DataError

RIGHT = np.array([True] * 45 + [False] * 26 + [True] * 100 + [False] * 29)
OTHER = np.array([False] * 45 + [True] * 26 + [True] * 100 + [False] * 29)
ALONE = [str(row) for row in range(len(RIGHT))]


def test_counts_and_mcnemars_test() -> None:
    found = paired_difference(RIGHT, OTHER, ALONE, num_resamples=2000, seed=1)
    assert (found.only_one, found.only_other) == (45, 26)
    assert found.value == pytest.approx(19 / 200)
    assert found.fewer_errors == pytest.approx(19 / 74)
    assert found.p_value == pytest.approx(0.03195, abs=1e-4)  # R: binom.test(45, 71)
    # Of independent rows: 1.96 standard errors of the mean gain to either side.
    half = 1.96 * np.sqrt((71 / 200 - (19 / 200) ** 2) / 200)
    assert found.low == pytest.approx(19 / 200 - half, abs=0.01)
    assert found.high == pytest.approx(19 / 200 + half, abs=0.01)


def test_rows_of_one_subject_are_no_evidence_each() -> None:
    """Four rows of each subject that are right or wrong together: the interval is twice as wide."""
    right, other = np.repeat(RIGHT, 4), np.repeat(OTHER, 4)
    subjects = [str(row // 4) for row in range(len(right))]
    alone = [str(row) for row in range(len(right))]
    whole, each = (
        paired_difference(right, other, groups, num_resamples=2000, seed=1)
        for groups in (subjects, alone)
    )
    assert whole.value == each.value
    assert (whole.high - whole.low) / (each.high - each.low) == pytest.approx(2, abs=0.15)


def test_two_that_never_differ() -> None:
    right = np.ones(5, dtype=bool)
    found = paired_difference(right, right, ["a"] * 5, num_resamples=10, seed=0)
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert found.fewer_errors is None


def test_nothing_to_compare() -> None:
    with pytest.raises(DataError, match="no rows"):
        paired_difference(np.ones(0, bool), np.ones(0, bool), [], num_resamples=10, seed=0)


def _predictions(head: str, clusters: str, labels: str = "aabb?") -> pa.Table:
    names = [f"slice-{number}" for number in range(len(labels))]
    return pa.table(
        {
            "sample_id": names,
            "path": names,
            "frame": [""] * len(names),
            "label": [None if label == "?" else label for label in labels],
            "head": list(head),
            "cluster_class": list(clusters),
            "clean": [True, False, True, False, True],
            "strict": pa.nulls(len(names), pa.bool_()),
        }
    )


def test_figures_by_subset_and_predictor() -> None:
    ours, control = _predictions("aabba", "aabaa"), _predictions("abaaa", "aabba")
    figures = compare(ours, control, {}, num_resamples=50, seed=0)
    assert figures["difference/test/all/head/accuracy"] == 3 / 4
    assert figures["fewer_errors/test/all/head/accuracy"] == 1
    assert figures["only_run/test/clean/head/accuracy"] == 1
    assert figures["only_control/test/all/cluster/accuracy"] == 1
    assert "fewer_errors/test/all/cluster/accuracy" not in figures  # the control has none
    assert not any("strict" in name for name in figures)


def test_other_slices_are_refused() -> None:
    ours = _predictions("aabba", "aabaa")
    with pytest.raises(DataError, match="other test slices"):
        compare(ours, ours.slice(1), {}, num_resamples=50, seed=0)
