"""Paired differences between a run and its control."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from brainray.engine.accuracy import bootstrap_interval
from brainray.engine.compare import (
    compare,
    intervals_of_mean_gains,
    paired_difference,
    without_comparison,
)
from brainray.errors import DataError

RIGHT = np.array([True] * 45 + [False] * 26 + [True] * 100 + [False] * 29)
OTHER = np.array([False] * 45 + [True] * 26 + [True] * 100 + [False] * 29)
GAINS = RIGHT.astype(int) - OTHER
ALONE = [str(row) for row in range(len(RIGHT))]


def test_counts_and_mcnemars_test() -> None:
    found = paired_difference(RIGHT, OTHER)
    assert (found["only_run"], found["only_control"]) == (45, 26)
    assert found["difference"] == pytest.approx(19 / 200)
    assert found["fewer_errors"] == pytest.approx(19 / 74)
    assert found["p"] == pytest.approx(0.03195, abs=1e-4)  # R: binom.test(45, 71)
    # Of independent rows: 1.96 standard errors of the mean gain to either side.
    half = 1.96 * np.sqrt((71 / 200 - (19 / 200) ** 2) / 200)
    interval = bootstrap_interval(GAINS, ALONE, seed=1, num_resamples=2000)
    assert interval == pytest.approx((19 / 200 - half, 19 / 200 + half), abs=0.01)


def test_two_that_never_differ() -> None:
    found = paired_difference(RIGHT, RIGHT)
    assert (found["difference"], found["fewer_errors"], found["p"]) == (0, 0, 1)


def test_the_interval_of_avoided_errors_is_that_of_resampled_rows() -> None:
    """Both the gain and the control's errors are those of the drawn rows, here all at once."""
    found = bootstrap_interval(GAINS, ALONE, 1, 5000, ~OTHER)
    rng = np.random.default_rng(2)
    won, lost, both_wrong, _ = rng.multinomial(200, [45 / 200, 26 / 200, 29 / 200, 0.5], 50_000).T
    shares = (won - lost) / (won + both_wrong)
    # Student's t of the 74 errors, and their n / (n - 1) of the variance.
    tail = stats.norm.sf(stats.t.ppf(0.975, 73) * np.sqrt(74 / 73))
    expected = np.quantile(shares, [tail, 1 - tail])
    assert found == pytest.approx(expected, abs=0.015)


def test_the_interval_of_avoided_errors_covers_the_truth() -> None:
    """Of 100 subjects whose slices are hard together, with a third of the errors avoided."""
    rng = np.random.default_rng(0)
    subjects, num_covered = np.repeat(np.arange(100), 4), 0
    for _ in range(200):
        chance = rng.beta(0.5, 4.5, 100)[subjects]  # of an error by the control: 0.1 on average
        right, other = rng.random(400) >= chance * 2 / 3, rng.random(400) >= chance
        gains = right.astype(int) - other
        found = bootstrap_interval(gains, subjects.astype(str), 0, 300, ~other)
        assert found is not None
        num_covered += found[0] <= 1 / 3 <= found[1]
    assert 0.92 <= num_covered / 200 <= 0.985


def test_errors_of_a_few_subjects_have_no_interval() -> None:
    """Otherwise resamples without an error of the control would count."""
    rows = np.arange(40)
    for num_errors, is_known in ((9, False), (10, True)):
        other = rows >= num_errors
        gains = (other | (rows < 5)).astype(int) - other
        found = bootstrap_interval(gains, ALONE[:40], 0, 50, ~other)
        assert (found is not None) == is_known


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
            "clean": [number % 2 == 0 for number in range(len(labels))],
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
    with pytest.raises(DataError, match="different test slices"):
        compare(ours, ours.slice(1), {}, num_resamples=50, seed=0)
    with pytest.raises(DataError, match="different test slices"):
        intervals_of_mean_gains([ours, ours], [ours, ours.slice(1)], {}, num_resamples=9, seed=0)


def test_the_same_slices_in_another_order_are_refused() -> None:
    ours = _predictions("aabba", "aabaa")
    with pytest.raises(DataError, match="different test slices"):
        compare(ours, ours.take([1, 0, 2, 3, 4]), {}, num_resamples=50, seed=0)


def test_subjects_are_resampled_as_a_whole() -> None:
    """Four slices of each of 200 subjects: every interval is twice as wide as of slices alone."""
    labels, found = "a" * 800, np.repeat(np.where(RIGHT, "a", "b"), 4)
    other = np.repeat(np.where(OTHER, "a", "b"), 4)
    ours, control = (_predictions("".join(each), labels, labels) for each in (found, other))
    subjects = {f"slice-{row}": f"subject-{row // 4}" for row in range(800)}
    whole, alone = (
        compare(ours, control, groups, num_resamples=2000, seed=1) for groups in (subjects, {})
    )
    for kind in ("difference", "fewer_errors"):
        name = f"{kind}/test/all/head/accuracy"
        widths = [of[f"{name}_high"] - of[f"{name}_low"] for of in (whole, alone)]
        assert widths[0] / widths[1] == pytest.approx(2, abs=0.15)
        assert whole[name] == alone[name]


def test_the_mean_gain_is_over_the_control() -> None:
    ours, control = (
        _predictions("".join(np.where(right, "a", "b")), "a" * 200, "a" * 200)
        for right in (RIGHT, OTHER)
    )
    found = intervals_of_mean_gains([ours], [control], {}, num_resamples=2000, seed=1)
    assert np.mean(found["difference/test/all/head/accuracy"]) == pytest.approx(19 / 200, abs=0.01)


def test_a_subset_has_the_interval_of_its_own_groups() -> None:
    ours, control = (_predictions(head, "a" * 40, "a" * 40) for head in ("ab" * 20, "b" * 40))
    clean = pa.array([False] * 20 + [True] * 20)
    ours, control = (
        each.set_column(each.column_names.index("clean"), "clean", clean)
        for each in (ours, control)
    )
    groups = {f"slice-{row}": "one subject" for row in range(20)}  # the clean ones are their own
    found = compare(ours, control, groups, num_resamples=50, seed=0)
    assert "difference/test/clean/head/accuracy_low" in found


def test_a_comparison_can_be_taken_away_again() -> None:
    ours, control = _predictions("aabba", "aabaa"), _predictions("abaaa", "abbba")
    compared = compare(ours, control, {}, num_resamples=50, seed=0)
    own = {"test/all/head/accuracy": 0.5, "num_slices": 4.0}
    assert without_comparison(own | compared) == own


def test_the_mean_gain_of_several_runs_varies_with_the_slices_that_they_share() -> None:
    """Two runs that gain on the same slices know no more than one; on others, they do."""
    labels = "a" * 200
    control = _predictions("b" * 200, "b" * 200, labels)
    first = _predictions("a" * 100 + "b" * 100, "b" * 200, labels)
    second = _predictions("b" * 100 + "a" * 100, "b" * 200, labels)
    name = "difference/test/all/head/accuracy"

    def width(*runs: pa.Table) -> float:
        settings = {"num_resamples": 2000, "seed": 0}
        found = intervals_of_mean_gains(runs, [control] * len(runs), {}, **settings)
        return float(np.ptp(found[name])) if name in found else 0.0

    assert width(first) == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(200), rel=0.05)
    assert width(first, first) == width(first)
    assert width(first, second) == 0  # every slice gains the same
