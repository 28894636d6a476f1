"""What to label next, by hand: doubt, turns of clusters, and one slice of each group."""

import numpy as np
import pytest

from brainray.clustering.next_labels import choose_to_label, margin_uncertainty


def choose(
    uncertainty: list[float],
    clusters: list[int] | None = None,
    groups: list[list[str | None]] | None = None,
    known: list[set[str]] | None = None,
    num_slices: int = 3,
) -> list[int]:
    groups = groups or [[None] * len(uncertainty)]
    return choose_to_label(
        np.array(uncertainty),
        np.array(clusters or [0] * len(uncertainty)),
        groups,
        known or [set() for _ in groups],
        num_slices,
    ).tolist()


def test_uncertainty_is_one_less_the_lead_of_the_best_class() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert margin_uncertainty(probabilities) == pytest.approx([0.5, 1.0, 0.0])


def test_within_one_cluster_the_most_uncertain_come_first() -> None:
    assert choose([0.1, 0.9, 0.5, 0.7]) == [1, 3, 2]
    assert choose([0.1, 0.9], num_slices=5) == [1, 0]


def test_clusters_take_turns() -> None:
    uncertainty = [0.9, 0.8, 0.7, 0.4, 0.3]
    assert choose(uncertainty, [0, 0, 0, 1, 1], num_slices=4) == [0, 3, 1, 4]


def test_one_of_each_group_comes_before_a_second_of_any_whatever_its_cluster() -> None:
    uncertainty = [0.9, 0.8, 0.7, 0.4, 0.3, 0.2]
    groups: list[list[str | None]] = [["x", "x", "x", None, None, None]]
    assert choose(uncertainty, [0, 0, 0, 1, 1, 1], groups, num_slices=5) == [0, 3, 4, 5, 1]


def test_a_cluster_without_doubt_gets_no_turn() -> None:
    # Nine compete for three places: the sure cluster's slice is the tenth.
    uncertainty = [0.9 - 0.01 * place for place in range(9)] + [0.0]
    assert choose(uncertainty, [0] * 9 + [1]) == [0, 1, 2]


def test_mates_of_a_chosen_or_labelled_slice_stand_back() -> None:
    uncertainty = [0.9, 0.8, 0.7, 0.6]
    assert choose(uncertainty, groups=[["x", "x", "y", None]]) == [0, 2, 3]
    assert choose(uncertainty, groups=[["x", "x", "y", None]], num_slices=4) == [0, 2, 3, 1]
    assert choose(uncertainty, groups=[["x", "x", "y", None]], known=[{"y"}]) == [0, 3, 1]
    subjects: list[str | None] = [None, None, "s", "s"]
    assert choose(uncertainty, groups=[["x", "x", "y", "z"], subjects]) == [0, 2, 1]


def test_a_mate_as_a_copy_and_by_subject_is_one_mate() -> None:
    copies: list[str | None] = ["x", "x", "y", "y", "y"]
    subjects: list[str | None] = ["s", "s", None, None, None]
    # Slice 1 stands back behind its one mate, slice 4 behind two.
    chosen = choose([0.9, 0.8, 0.7, 0.6, 0.5], groups=[copies, subjects], num_slices=5)
    assert chosen == [0, 2, 1, 3, 4]
