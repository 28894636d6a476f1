"""Groups are chains of links, and keep their names when they grow."""

import numpy as np

from brainray.mri.groups import (
    conflicting_groups,
    connected_groups,
    first_connected,
    joint_groups,
    keep_names,
)


def test_a_chain_of_links_is_one_group_named_by_its_smallest() -> None:
    links = np.array([0, 1]), np.array([1, 3])
    assert connected_groups(["d", "b", "c", "e"], *links) == ["b", "b", "c", "b"]


def test_items_are_connected_by_any_path_of_links_whatever_their_direction() -> None:
    first, second = np.array([5, 3, 3, 2]), np.array([3, 1, 1, 2])
    assert first_connected(6, first, second).tolist() == [0, 1, 2, 1, 4, 1]
    assert first_connected(2, first[:0], second[:0]).tolist() == [0, 1]
    again = np.zeros(300, np.int64), np.ones(300, np.int64)  # one link, often
    assert first_connected(2, *again).tolist() == [0, 0]


def test_equal_names_are_one_item() -> None:
    none = np.empty(0, np.int64)
    assert connected_groups(["b", "a", "b"], none, none) == ["b", "a", "b"]
    assert connected_groups(["b", "a", "b"], np.array([1]), np.array([2])) == ["a", "a", "a"]


def test_joint_groups_follow_either_id() -> None:
    duplicates = ["d1", "d1", "d2", "d3", "d4"]
    subjects = [None, "s1", "s1", None, None]
    assert joint_groups(duplicates, subjects) == ["d1", "d1", "d1", "d3", "d4"]
    assert joint_groups(["a", "b"], ["b", None]) == ["a", "b"]  # the two kinds of id are apart


def test_slices_with_different_labels_are_in_conflict_and_those_without_a_label_are_not() -> None:
    groups = ["g", "g", "h", "h", "i", "i"]
    assert conflicting_groups(groups, ["a", "b", "a", None, "b", "b"]) == {"g"}


def test_a_group_keeps_its_name_and_a_new_one_gets_its_own() -> None:
    groups = ["a", "a", "c", "d", "d"]
    previous = [None, "b", None, "y", "x"]
    assert keep_names(groups, previous) == ["b", "b", "c", "x", "x"]


def test_of_a_group_that_came_apart_one_part_keeps_the_name() -> None:
    # The link between b and d was wrong; neither "b" nor "c", which was found since, is its own.
    assert keep_names(["b", "c", "d"], ["b", None, "b"]) == ["b", "c", "d"]
    # The slice that gave the name is gone, or has joined a smaller one.
    assert keep_names(["c", "d"], ["b", "b"]) == ["b", "d"]
    assert keep_names(["a", "a", "d"], [None, "b", "b"]) == ["b", "b", "d"]
