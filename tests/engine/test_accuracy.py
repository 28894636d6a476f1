import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, f1_score

from brainray.engine.accuracy import (
    accuracy_interval,
    bootstrap_interval,
    classification_metrics,
    reweighted_accuracy,
)
from brainray.errors import DataError


def test_classification_metrics_by_hand_leave_out_a_class_without_rows() -> None:
    labels = np.array([0, 0, 0, 0, 2, 2])
    predictions = np.array([0, 0, 0, 1, 2, 0])
    result = classification_metrics(labels, predictions, ["glioma", "meningioma", "notumor"])
    assert result == pytest.approx(
        {
            "accuracy": 4 / 6,
            "balanced_accuracy": (3 / 4 + 1 / 2) / 2,
            "f1_macro": (3 / 4 + 2 / 3) / 2,
            "precision/glioma": 3 / 4,
            "recall/glioma": 3 / 4,
            "f1/glioma": 3 / 4,
            "support/glioma": 4,
            "precision/notumor": 1,
            "recall/notumor": 1 / 2,
            "f1/notumor": 2 / 3,
            "support/notumor": 2,
        }
    )


def test_a_class_with_fewer_rows_than_asked_has_no_metrics_and_leaves_no_averages() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    result = classification_metrics(labels, labels, ["glioma", "notumor"], min_support=3)
    of_glioma = {f"{name}/glioma": 1.0 for name in ("precision", "recall", "f1")}
    supports = {"support/glioma": 3.0, "support/notumor": 2.0}
    assert result == {"accuracy": 1.0} | of_glioma | supports


def test_a_class_that_is_never_predicted_has_a_precision_of_zero_and_counts() -> None:
    result = classification_metrics(np.array([0, 0, 1]), np.array([0, 0, 0]), ["a", "b"])
    assert result["precision/b"] == result["f1/b"] == 0.0
    assert result["balanced_accuracy"] == 0.5  # one row is enough


def test_averages_agree_with_scikit_learn_when_all_classes_occur() -> None:
    generator = np.random.default_rng(1)
    labels, predictions = generator.integers(0, 4, size=(2, 200))
    result = classification_metrics(labels, predictions, list("abcd"))
    assert result["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(labels, predictions)
    )
    assert result["f1_macro"] == pytest.approx(f1_score(labels, predictions, average="macro"))


def test_unlabelled_rows_are_not_scored_in_silence() -> None:
    with pytest.raises(DataError, match="1 rows have no label"):
        classification_metrics(np.array([0, -1]), np.array([0, 0]), ["a", "b"])


def test_bootstrap_interval_agrees_with_resampled_rows_and_with_the_normal_approximation() -> None:
    correct = np.arange(400) < 320
    alone = np.arange(400).astype(str)
    found = bootstrap_interval(correct, alone, seed=0, num_resamples=20_000)
    half_width = 1.96 * (0.8 * 0.2 / 400) ** 0.5
    assert found == pytest.approx((0.8 - half_width, 0.8 + half_width), abs=0.004)
    generator = np.random.default_rng(1)
    resampled = correct[generator.integers(0, 400, size=(4000, 400))].mean(axis=1)
    assert found == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.005)
    again = bootstrap_interval(correct, alone, seed=0)
    assert bootstrap_interval(correct, alone, seed=0) == again
    # Subjects of ten slices that are right or wrong together: as if there were 40 slices.
    subjects = (np.arange(400) // 10).astype(str)
    by_subject = bootstrap_interval(correct, subjects, seed=0, num_resamples=4000)
    half_width = 1.96 * (0.8 * 0.2 / 40) ** 0.5
    assert by_subject == pytest.approx((0.8 - half_width, 0.8 + half_width), abs=0.03)


def test_bootstrap_interval_by_hand() -> None:
    """Of ten slices of which seven are right: in a resample, their number is binomial."""
    found = bootstrap_interval(np.arange(10) < 7, list("abcdefghij"), seed=0, num_resamples=50_000)
    # Percentiles are expanded by Student's t and by n / (n - 1) of the variance.
    tail = stats.norm.sf(stats.t.ppf(0.975, 9) * np.sqrt(10 / 9))
    assert found == pytest.approx(stats.binom.ppf([tail, 1 - tail], 10, 0.7) / 10)
    assert found == pytest.approx((0.3, 1.0))  # 0.4 without n / (n - 1)


@pytest.mark.parametrize("is_unequal", [False, True])
def test_bootstrap_interval_covers_the_truth_for_few_groups(is_unequal: bool) -> None:
    """Of twelve subjects, which percentiles alone cover in 88 and 86 of 100 cases."""
    generator = np.random.default_rng(0)
    num_covered = 0
    for _ in range(300):
        sizes = generator.geometric(0.1, 12) if is_unequal else np.full(12, 10)
        chance = generator.beta(3.2, 0.8, 12)  # of a right answer, by subject: 0.8 on average
        subjects = np.repeat(np.arange(12), sizes)
        correct = generator.random(len(subjects)) < chance[subjects]
        found = bootstrap_interval(correct, subjects.astype(str), seed=0, num_resamples=300)
        assert found is not None
        num_covered += found[0] <= 0.8 <= found[1]
    assert 0.9 <= num_covered / 300 <= 0.97


@pytest.mark.parametrize("is_unequal", [False, True])
def test_accuracy_interval_errs_on_neither_side_near_one(is_unequal: bool) -> None:
    """Percentiles are above an accuracy of 0.92 in 11 of 100 cases, below it in one of 100."""
    generator = np.random.default_rng(0)
    num_above = num_below = 0
    for _ in range(400):
        sizes = 1 + generator.geometric(0.15, 20) if is_unequal else np.full(20, 6)
        chance = generator.beta(0.92 * 7 / 3, 0.08 * 7 / 3, 20)
        subjects = np.repeat(np.arange(20), sizes)
        correct = generator.random(len(subjects)) < chance[subjects]
        found = accuracy_interval(correct, subjects.astype(str), seed=0, num_resamples=300)
        assert found is None or 0 < found[0] < correct.mean() < found[1] < 1
        num_above += found is not None and found[0] > 0.92
        num_below += found is not None and found[1] < 0.92
    assert num_above / 400 < 0.07
    assert 0.005 < num_below / 400 < 0.05


def test_accuracy_interval_is_that_of_the_bootstrap_for_many_groups() -> None:
    correct, alone = np.arange(2000) < 1600, np.arange(2000).astype(str)
    found = accuracy_interval(correct, alone, seed=0, num_resamples=5000)
    expected = bootstrap_interval(correct, alone, seed=0, num_resamples=5000)
    assert expected is not None
    assert found == pytest.approx(expected, abs=0.002)
    assert accuracy_interval(np.ones(20, dtype=bool), alone[:20], seed=0) is None


def test_accuracy_interval_by_hand() -> None:
    """Of twelve subjects of unequal size."""
    sizes = np.array([40, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 25])
    right = np.array([30, 1, 1, 2, 4, 3, 6, 5, 4, 9, 8, 20])
    subjects = np.repeat(np.arange(12), sizes)
    correct = np.concatenate(
        [np.arange(size) < num for size, num in zip(sizes, right, strict=True)]
    )
    found = accuracy_interval(correct, subjects.astype(str), seed=0, num_resamples=20_000)
    accuracy, effective = right.sum() / sizes.sum(), sizes.sum() ** 2 / (sizes**2).sum()  # Kish
    # The standard deviation of resampled subjects; with as many degrees of freedom as that many
    # subjects have, and their n / (n - 1).
    drawn = np.random.default_rng(1).integers(0, 12, size=(20_000, 12))
    error = (right[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)).std()
    error *= np.sqrt(effective / (effective - 1))
    reach = stats.t.ppf(0.975, effective - 1) * error / (accuracy * (1 - accuracy))
    logit = np.log(accuracy / (1 - accuracy))
    expected = [1 / (1 + np.exp(-(logit + side))) for side in (-reach, reach)]
    assert found == pytest.approx(expected, abs=0.002)


def test_bootstrap_interval_is_none_where_it_would_mislead() -> None:
    ten = [str(number) for number in range(10)]
    mixed = np.arange(10) < 5
    assert bootstrap_interval(mixed, ten, seed=0) is not None
    assert bootstrap_interval(mixed, [*ten[:9], "0"], seed=0) is None  # nine groups
    assert bootstrap_interval(np.ones(10, dtype=bool), ten, seed=0) is None
    assert bootstrap_interval(np.tile([True, False], 10), np.repeat(ten, 2), seed=0) is None


def test_reweighted_accuracy_by_hand() -> None:
    labels, predictions = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 0])
    # Recalls 3/4 and 1/2.
    for mix, expected in (
        ([1, 3], (0.75 + 1.5) / 4),
        ([0.5, 0.5, 0], 0.625),  # a third class without rows
        ([4, 2], 4 / 6),  # their own
        ([3, 0], 0.75),
    ):
        found = reweighted_accuracy(labels, predictions, np.array(mix))
        assert found == pytest.approx(expected)
