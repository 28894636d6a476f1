"""Successive files, and a test split that parts few of them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from brainray.mri.file_order import in_stretches, successive_files
from brainray.mri.split import draw_test


def test_names_that_differ_in_numbers_only_are_in_the_order_of_these() -> None:
    names = ["a/slice10", "b/slice3", "a/slice9", None, "a/slice2", "a/cut1", "x", "y", "a/slice11"]
    rows = {name: row for row, name in enumerate(names)}
    expected = [("a/slice2", "a/slice9"), ("a/slice9", "a/slice10"), ("a/slice10", "a/slice11")]
    assert [tuple(pair) for pair in successive_files(names)] == [
        (rows[first], rows[second]) for first, second in expected
    ]


def test_a_folder_of_numbered_folders_is_one_order() -> None:
    names = ["patient10/1.png", "patient2/2.png", "patient2/1.png"]
    assert successive_files(names).tolist() == [[2, 1], [1, 0]]


@pytest.mark.parametrize("names", [[], ["only1"], [None, None], ["a", "b"], ["ff0a1c", "0be31d"]])
def test_names_without_an_order_give_no_pair(names: list[str | None]) -> None:
    assert successive_files(names).shape == (0, 2)


def test_groups_without_links_are_in_no_stretch() -> None:
    place = {"a": 0.5, "b": 0.9, "c": 0.1}
    assert in_stretches(place, ["a", "b", "b", "c"], np.array([[1, 2]])) == []


def test_stretches_grow_in_both_directions_until_they_have_a_hundred_slices() -> None:
    groups = [f"{number // 25:02d}" for number in range(40 * 25)]
    successive = np.stack([np.arange(999), np.arange(1, 1000)], axis=1)
    place = dict.fromkeys(groups, 0.5) | {"20": 0.1, "05": 0.2}
    ordered = in_stretches(place, groups, successive)
    assert sorted(ordered) == sorted(set(groups))
    assert ordered[:8] == ["20", "19", "21", "18", "05", "04", "06", "03"]


def test_a_stretch_goes_on_with_the_group_that_it_surrounds() -> None:
    """Two files of a group lie between those of another, a third far away."""
    successive = np.array([[0, 1], [1, 2], [2, 3], [3, 4]])
    place = {"a": 0.1, "c": 0.5, "b": 0.9}
    assert in_stretches(place, [*"ababc"], successive) == ["a", "b", "c"]


def test_a_stretch_starts_at_every_file_with_the_same_probability() -> None:
    """One group has half of the files, between those of groups of one file each."""
    groups = [name for number in range(20) for name in ("large", f"{number}")]
    successive = np.stack([np.arange(39), np.arange(1, 40)], axis=1)
    rng = np.random.default_rng(0)
    starts = [
        in_stretches({name: rng.random() for name in dict.fromkeys(groups)}, groups, successive)[0]
        for _ in range(400)
    ]
    assert starts.count("large") / 400 == pytest.approx(0.5, abs=0.08)


def series(num_series: int, length: int) -> tuple[list[str], list[str]]:
    """Names, and groups of two slices each."""
    names = [f"{number:04d}.png" for number in range(num_series * length)]
    return names, [f"g{number // 2:04d}" for number in range(num_series * length)]


@pytest.mark.parametrize("seed", range(5))
def test_a_split_in_stretches_parts_few_series(seed: int) -> None:
    names, groups = series(num_series=100, length=10)
    of_series = np.arange(1000) // 10
    successive = successive_files(names)
    at_random = draw_test([None] * 1000, groups, fraction=0.2, seed=seed)
    drawn = draw_test([None] * 1000, groups, successive=successive, fraction=0.2, seed=seed)
    assert drawn.sum() == at_random.sum() == 200
    num_ends = sum(one != other for one, other in pairwise(drawn))
    assert num_ends <= 4  # of two stretches
    parted = [
        len(np.intersect1d(of_series[is_test], of_series[~is_test]))
        for is_test in (at_random, drawn)
    ]
    assert parted[0] > 40
    assert parted[1] <= num_ends


def held_out_shares(
    names: Sequence[str | None], part: list[str], num_seeds: int
) -> dict[str, float]:
    """The held-out share of each part of one class of single slices, mean of some draws."""
    groups = [f"g{row:04d}" for row in range(len(names))]
    successive = successive_files(names)
    draws = [
        draw_test(["a"] * len(names), groups, successive=successive, fraction=0.2, seed=seed)
        for seed in range(num_seeds)
    ]
    return {
        name: float(np.mean([drawn[np.array(part) == name].mean() for drawn in draws]))
        for name in set(part)
    }


@pytest.mark.parametrize("num_numbered", [100, 500, 900])
def test_files_with_an_order_and_without_one_have_the_same_share_of_every_draw(
    num_numbered: int,
) -> None:
    names = [f"{row}.png" if row < num_numbered else None for row in range(1000)]
    part = ["other" if name is None else "numbered" for name in names]
    assert held_out_shares(names, part, num_seeds=1) == {"numbered": 0.2, "other": 0.2}


def test_short_series_are_as_likely_to_be_held_out_as_long_ones() -> None:
    names = [
        f"{row}.png" if row < 1000 else f"folder-{'ab'[row % 2] * (row // 20)}/{row}.png"
        for row in range(2000)
    ]
    part = ["long" if row < 1000 else "short" for row in range(2000)]
    for share in held_out_shares(names, part, num_seeds=30).values():
        assert share == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_files_that_come_later_between_others_join_their_side(seed: int) -> None:
    names, groups = [f"{row:04d}" for row in range(1000)], [f"g{row:04d}" for row in range(1000)]
    old = np.arange(0, 1000, 2)
    drawn = draw_test(
        ["a"] * 500,
        [groups[row] for row in old],
        successive=successive_files([names[row] for row in old]),
        fraction=0.2,
        seed=seed,
    )
    before = {groups[row]: bool(out) for row, out in zip(old, drawn, strict=True)}
    generations = [row % 2 for row in range(1000)]
    after = draw_test(
        ["a"] * 1000,
        groups,
        generations,
        before,
        successive_files(names),
        fraction=0.2,
        seed=seed,
    )
    np.testing.assert_array_equal(after[old], drawn)
    between = np.arange(1, 999, 2)
    same = after[between - 1] == after[between + 1]
    np.testing.assert_array_equal(after[between][same], after[between - 1][same])
    assert after.mean() == pytest.approx(0.2, abs=0.01)


def test_stretches_do_not_depend_on_the_order_of_rows() -> None:
    names, groups = series(num_series=20, length=10)
    labels = [["a", "b", None][number // 4 % 3] for number in range(200)]
    shuffled = np.random.default_rng(0).permutation(200)
    drawn, again = (
        draw_test(
            [labels[row] for row in rows],
            [groups[row] for row in rows],
            successive=successive_files([names[row] for row in rows]),
            fraction=0.2,
            seed=1,
        )
        for rows in (np.arange(200), shuffled)
    )
    assert again.tolist() == drawn[shuffled].tolist()
    for name in ("a", "b", None):
        of_class = np.array([label == name for label in labels])
        assert drawn[of_class].mean() == pytest.approx(0.2, abs=0.03)
