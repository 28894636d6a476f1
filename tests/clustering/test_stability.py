"""The number of clusters that is recommended, and the reasons given."""

import math

import numpy as np
import pytest

from brainray.clustering import stability as stability_module
from brainray.clustering.num_clusters import NumClustersScores, score_num_clusters
from brainray.clustering.stability import Stability, measure_stability, recommend
from brainray.errors import ClusteringError

KS = [2, 3, 4, 5]
ONE = 9.0, -9.0  # BIC and gap of a single cluster, worse than any


def three_groups() -> np.ndarray:
    generator = np.random.default_rng(0)
    centers = np.array([[0.0, 0.0], [6.0, 0.0], [0.0, 7.0]])
    return centers[np.arange(150) % 3] + generator.standard_normal((150, 2))


def test_samples_agree_on_the_groups_that_are_there() -> None:
    stability = measure_stability(three_groups(), KS, num_pairs=4)
    assert stability.chosen == 3
    assert stability.mean[1] > 0.95
    assert stability.mean[3] < stability.mean[1] - 0.1


def test_the_same_seed_gives_the_same_stability() -> None:
    first, second = (measure_stability(three_groups(), [2, 3], num_pairs=2) for _ in range(2))
    assert first == second


def test_the_largest_number_within_one_error_of_the_most_stable_is_chosen() -> None:
    # 0.93 is above 0.95 - 0.03, 0.80 is not, whatever its own error.
    assert Stability([2, 3, 4], [0.95, 0.93, 0.80], [0.03, 0.01, 0.2]).chosen == 3


def test_the_error_falls_with_the_root_of_the_number_of_pairs() -> None:
    x = np.random.default_rng(0).standard_normal((80, 2))
    few, many = (measure_stability(x, [3], num_pairs=pairs).error[0] for pairs in (10, 40))
    assert few / many == pytest.approx(2, abs=0.6)


def test_the_error_is_that_of_the_mean_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    agreements = iter([0.2, 0.4, 0.9])
    monkeypatch.setattr(stability_module, "adjusted_rand_score", lambda *_: next(agreements))
    found = measure_stability(three_groups(), [2], num_pairs=3)
    # The mean is 0.5, and (0.3^2 + 0.1^2 + 0.4^2) / 2 = 0.13.
    assert found.error == pytest.approx([math.sqrt(0.13 / 3)])


def test_three_groups_are_recommended_with_reasons() -> None:
    x = three_groups()
    scores = score_num_clusters(x, KS, num_references=4)
    found = recommend(scores, measure_stability(x, KS, num_pairs=4))
    assert found.num_clusters == 3
    assert any("criteria agree" in reason for reason in found.reasons)
    assert any("at K = 3: silhouette" in reason for reason in found.reasons)


def test_the_most_stable_of_contradicting_choices_wins_and_the_doubt_is_reported() -> None:
    scores = NumClustersScores(
        KS, [0.9, 0.1, 0.1, 0.1], [4.0, 3.0, 2.0, 1.0], [0.1, 0.9, 0.2, 0.2], [0.0] * 4, *ONE
    )
    assert scores.chosen == {"silhouette": 2, "bic": 5, "gap": 3}
    stability = Stability(KS, [0.5, 0.6, 0.99, 0.7], [0.01] * 4)
    found = recommend(scores, stability)
    assert found.num_clusters == 4
    assert any("no two criteria agree" in reason for reason in found.reasons)


def test_more_votes_count_more_than_stability() -> None:
    three = [2, 3, 4]
    scores = NumClustersScores(
        three, [0.9, 0.1, 0.1], [1.0, 2.0, 3.0], [0.1, 0.5, 0.9], [0.0] * 3, *ONE
    )
    assert recommend(scores, Stability(three, [0.5, 0.6, 0.99], [0.01] * 3)).num_clusters == 2


def test_slices_without_groups_are_reported_as_such() -> None:
    x = np.random.default_rng(0).standard_normal((200, 2))
    scores = score_num_clusters(x, KS, num_references=4)
    found = recommend(scores, measure_stability(x, KS, num_pairs=3))
    assert any(
        "by BIC and the gap statistic, a single cluster" in reason for reason in found.reasons
    )


def test_a_choice_at_the_end_of_the_range_is_reported() -> None:
    for first, has_reason in ((3, True), (2, False)):  # nothing can be tried below 2
        candidates = [first, first + 1]
        scores = NumClustersScores(candidates, [0.9, 0.1], [1.0, 2.0], [0.9, 0.1], [0.0] * 2, *ONE)
        found = recommend(scores, Stability(candidates, [0.9, 0.2], [0.01] * 2))
        assert found.num_clusters == first
        assert any("end of the range" in reason for reason in found.reasons) == has_reason


def test_a_gap_that_rises_to_the_end_chooses_nothing() -> None:
    scores = NumClustersScores([2, 3], [0.9, 0.1], [1.0, 2.0], [0.1, 0.5], [0.01] * 2, *ONE)
    assert "gap" not in scores.chosen
    found = recommend(scores, Stability([2, 3], [0.9, 0.2], [0.01] * 2))
    assert any(reason.startswith("undecided: the gap statistic") for reason in found.reasons)
    assert any("3 of 3 criteria agree" in reason for reason in found.reasons)


def test_one_candidate_has_no_gap_to_compare_with() -> None:
    scores = NumClustersScores([3], [0.9], [1.0], [0.1], [0.01], *ONE)
    found = recommend(scores, Stability([3], [0.9], [0.01]))
    assert any("needs a second K" in reason for reason in found.reasons)


def test_too_few_slices_for_a_candidate_are_refused() -> None:
    with pytest.raises(ClusteringError, match=r"lower study\.candidate_num_clusters"):
        measure_stability(three_groups()[:5], KS)
