"""Draws are whole by group, stratified, nested, and independent of label values."""

from functools import partial

import numpy as np
import pytest

from brainray.errors import ConfigError, DataError
from brainray.mri.split import (
    _groups_by_class,
    check_validation_share,
    draw_roles,
    draw_test,
    inherited_labels,
)
from brainray.schema import LABELLED, LEFT_OUT, UNLABELLED_ROLE, VALIDATION


def slices(num_per_class: int = 200, group_size: int = 1) -> tuple[list[str | None], list[str]]:
    labels: list[str | None] = []
    groups: list[str] = []
    for name in ("a", "b", "c"):
        for number in range(num_per_class):
            labels.append(name)
            groups.append(f"{name}{number // group_size:05d}")
    return labels, groups


def roles(
    labels: list[str | None],
    groups: list[str],
    fraction: float,
    seed: int = 0,
    generations: list[int] | None = None,
) -> list[str]:
    return draw_roles(
        labels,
        groups,
        generations,
        labelled_fraction=fraction,
        validation_fraction=0.2,
        seed=seed,
    )


def readable(drawn: list[str]) -> set[int]:
    return {row for row, role in enumerate(drawn) if role != UNLABELLED_ROLE}


def test_every_class_gets_its_share_and_its_validation_part() -> None:
    labels, groups = slices()
    drawn = np.array(roles(labels, groups, 0.2))
    for name in ("a", "b", "c"):
        drawn_roles = drawn[np.array(labels) == name]
        assert (drawn_roles != UNLABELLED_ROLE).sum() == 40
        assert (drawn_roles == VALIDATION).sum() == 8


def test_smaller_draws_lie_within_larger_ones_role_by_role() -> None:
    labels, groups = slices(group_size=3)
    previous: list[str] | None = None
    for fraction in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        drawn = roles(labels, groups, fraction)
        if previous is not None:
            for before, now in zip(previous, drawn, strict=True):
                assert before in {UNLABELLED_ROLE, now}
        previous = drawn
    assert previous is not None
    assert UNLABELLED_ROLE not in previous


def test_no_group_straddles_roles() -> None:
    labels, groups = slices(group_size=4)
    drawn = roles(labels, groups, 0.3)
    for group in set(groups):
        members = {drawn[row] for row in range(len(groups)) if groups[row] == group}
        assert len(members) == 1


def test_the_draw_depends_on_the_seed_not_on_the_order_of_rows() -> None:
    labels, groups = slices()
    order = np.random.default_rng(0).permutation(len(labels))
    drawn = roles(labels, groups, 0.2)
    shuffled = roles([labels[i] for i in order], [groups[i] for i in order], 0.2)
    assert [drawn[i] for i in order] == shuffled
    assert readable(drawn) != readable(roles(labels, groups, 0.2, seed=1))


def test_slices_without_a_label_are_never_drawn() -> None:
    labels, groups = slices(20)
    labels[0], groups[0] = None, "unlabelled"
    drawn = roles(labels, groups, 1.0)
    assert drawn[0] == UNLABELLED_ROLE
    assert drawn.count(UNLABELLED_ROLE) == 1


def test_slices_without_a_label_never_learn_or_choose() -> None:
    labels, groups = slices(20, group_size=2)
    unlabelled = range(0, 60, 2)
    for row in unlabelled:
        labels[row] = None
    drawn = roles(labels, groups, 1.0)
    assert {drawn[row] for row in unlabelled} == {UNLABELLED_ROLE, LEFT_OUT}
    for row in unlabelled:
        assert (drawn[row] == LEFT_OUT) == (drawn[row + 1] == VALIDATION)


def test_a_tiny_fraction_still_gives_two_groups_of_each_class() -> None:
    labels, groups = slices(10)
    drawn = roles(labels, groups, 0.01)
    assert drawn.count(LABELLED) == 3
    assert drawn.count(VALIDATION) == 3


def test_related_groups_are_never_split_between_labelled_and_validation() -> None:
    labels, groups = slices(60)
    related_groups = [f"{group[0]}{int(group[1:]) // 3}" for group in groups]
    previous: set[int] = set()
    for fraction in (0.02, 0.2, 0.6, 1.0):
        drawn = draw_roles(
            labels,
            groups,
            related_groups=related_groups,
            labelled_fraction=fraction,
            validation_fraction=0.2,
            seed=0,
        )
        roles_by_related_group: dict[str, set[str]] = {}
        for own, role in zip(related_groups, drawn, strict=True):
            if role != UNLABELLED_ROLE:
                roles_by_related_group.setdefault(own, set()).add(role)
        assert all(len(found) == 1 for found in roles_by_related_group.values())
        for name in ("a", "b", "c"):
            drawn_roles = {role for role, label in zip(drawn, labels, strict=True) if label == name}
            assert {LABELLED, VALIDATION} <= drawn_roles
        assert previous <= readable(drawn)
        previous = readable(drawn)
    # Groups are drawn one by one: some related groups have slices drawn and slices not drawn.
    drawn = draw_roles(
        labels,
        groups,
        related_groups=related_groups,
        labelled_fraction=0.2,
        validation_fraction=0.2,
        seed=0,
    )
    assert any(
        {
            role == UNLABELLED_ROLE
            for role, one in zip(drawn, related_groups, strict=True)
            if one == own
        }
        == {True, False}
        for own in set(related_groups)
    )
    assert len(readable(drawn)) == 36


def test_slices_related_to_validation_slices_can_be_left_out() -> None:
    labels, groups = slices(60)
    related_groups = [f"{group[0]}{int(group[1:]) // 3}" for group in groups]
    draw = partial(
        draw_roles,
        labels,
        groups,
        related_groups=related_groups,
        labelled_fraction=0.2,
        validation_fraction=0.2,
        seed=0,
    )
    kept, drawn = draw(), draw(leave_out_related=True)
    validated = {own for own, role in zip(related_groups, drawn, strict=True) if role == VALIDATION}
    assert {LEFT_OUT, UNLABELLED_ROLE} <= set(drawn)
    for own, before, role in zip(related_groups, kept, drawn, strict=True):
        expected = LEFT_OUT if before == UNLABELLED_ROLE and own in validated else before
        assert role == expected


def test_related_groups_of_several_classes_are_nested_and_take_no_class_away() -> None:
    # Every subject has slices of two classes; which is drawn first depends on the fraction.
    labels: list[str | None] = [name for _ in range(20) for name in ("a", "b", "b")]
    groups = [f"g{row}" for row in range(60)]
    related_groups = [f"subject{row // 3}" for row in range(60)]
    before: list[str] | None = None
    for fraction in (0.01, 0.05, 0.1, 0.3, 1.0):
        drawn = draw_roles(
            labels,
            groups,
            related_groups=related_groups,
            labelled_fraction=fraction,
            validation_fraction=0.2,
            seed=2,
        )
        for name in ("a", "b"):
            drawn_roles = {role for role, label in zip(drawn, labels, strict=True) if label == name}
            assert {LABELLED, VALIDATION} <= drawn_roles
        for was, is_now in zip(before or drawn, drawn, strict=True):
            assert was in {UNLABELLED_ROLE, is_now}
        before = drawn


def test_slices_of_another_class_that_come_later_move_no_related_group() -> None:
    labels = ["b"] * 20 + ["a"] * 10
    groups = [f"g{row}" for row in range(30)]
    related_groups = [f"subject{row}" for row in range(30)]
    draw = partial(draw_roles, labelled_fraction=1.0, validation_fraction=0.3, seed=0)
    before = draw(labels, groups, related_groups=related_groups)
    labels += ["a"] * 20  # of every subject that had none
    groups += [f"later{row}" for row in range(20)]
    related_groups += [f"subject{row}" for row in range(20)]
    after = draw(labels, groups, [0] * 30 + [1] * 20, related_groups=related_groups)
    assert after[:30] == before
    assert after[30:] == before[:20]


def test_patients_with_slices_of_two_classes_take_no_class_away() -> None:
    labels: list[str | None] = []
    groups: list[str] = []
    for patient in range(30):  # all have slices without a tumour, 20 of them others with one
        for number in range(10):
            labels.append("tumour" if patient < 20 and number < 4 else "none")
            groups.append(f"p{patient}")
    drawn = roles(labels, groups, 0.3)
    for name in ("tumour", "none"):
        drawn_roles = [role for role, label in zip(drawn, labels, strict=True) if label == name]
        assert {LABELLED, VALIDATION} <= set(drawn_roles)
        num_drawn = len(drawn_roles) - drawn_roles.count(UNLABELLED_ROLE)
        assert 0.2 < num_drawn / len(drawn_roles) < 0.4
    for own in set(groups):
        assert len({role for role, one in zip(drawn, groups, strict=True) if one == own}) == 1


@pytest.mark.parametrize("only", range(10))
def test_a_class_that_only_whole_subjects_of_another_hold_is_named(only: int) -> None:
    # Each of ten subjects has a slice of the rare class, and one of them all of the common class.
    labels: list[str | None] = [*["rare"] * 10, *["common"] * 20]
    groups = [f"p{number}" for number in range(10)] + [f"p{only}"] * 20
    with pytest.raises(DataError, match="'common' without a slice for training or validation"):
        roles(labels, groups, 0.3)


def test_a_class_that_one_subject_has_alone_and_others_beside_a_rarer_one_is_drawn() -> None:
    # Twenty patients have slices with and without a tumour, one volunteer only those without.
    labels: list[str | None] = [*(["none"] * 10 + ["tumour"] * 5) * 20, *["none"] * 15]
    groups = [f"p{number // 15}" for number in range(len(labels))]
    for fraction in (0.1, 0.5, 1.0):
        drawn = roles(labels, groups, fraction)
        for name in ("tumour", "none"):
            of_class = {role for role, label in zip(drawn, labels, strict=True) if label == name}
            assert {LABELLED, VALIDATION} <= of_class


def test_a_class_with_one_slice_is_named() -> None:
    labels, groups = slices(10)
    with pytest.raises(DataError, match="class 'rare' has 1 labelled training slice"):
        roles([*labels, "rare"], [*groups, "rare0"], 0.5)
    with pytest.raises(DataError, match="no labelled training slice"):
        roles([None, None], ["x", "y"], 0.5)


def test_a_class_of_one_subject_is_named_however_many_slices_it_has() -> None:
    labels, groups = slices(10)
    one_subject = ["b" if group[0] == "b" else group for group in groups]
    with pytest.raises(DataError, match=r"'b' has 10 labelled training slice.* all of one subject"):
        draw_roles(
            labels,
            groups,
            related_groups=one_subject,
            labelled_fraction=0.5,
            validation_fraction=0.2,
            seed=0,
        )


@pytest.mark.parametrize("seed", range(5))
def test_a_tiny_fraction_gives_both_parts_a_related_group_of_each_class(seed: int) -> None:
    labels, groups = slices(60)
    drawn = draw_roles(
        labels,
        groups,
        related_groups=[f"{group[0]}{int(group[1:]) // 20}" for group in groups],
        labelled_fraction=0.001,
        validation_fraction=0.2,
        seed=seed,
    )
    assert drawn.count(LABELLED) == 3
    assert drawn.count(VALIDATION) == 3


@pytest.mark.parametrize(("share", "one_in"), [(0.5, 2), (0.35, 3), (0.26, 4), (0.15, 7)])
def test_the_validation_part_is_the_nearest_to_the_share_asked_for(
    share: float, one_in: int
) -> None:
    labels, groups = slices(84)
    drawn = draw_roles(labels, groups, labelled_fraction=1.0, validation_fraction=share, seed=0)
    assert drawn.count(VALIDATION) == 3 * 84 // one_in
    check_validation_share(share)


def test_a_validation_share_between_two_that_can_be_had_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"far from 1/2 and 1/3: use 0\.5 or 0\.33"):
        check_validation_share(0.42)


def test_unlabelled_slices_related_to_validation_slices_can_be_left_out() -> None:
    labels, groups = slices(20)
    related_groups = [*groups, *groups]
    drawn = draw_roles(
        [*labels, *[None] * 60],
        [*groups, *[f"unlabelled-{group}" for group in groups]],
        related_groups=related_groups,
        leave_out_related=True,
        labelled_fraction=1.0,
        validation_fraction=0.2,
        seed=0,
    )
    for labelled, unlabelled in zip(drawn[:60], drawn[60:], strict=True):
        assert unlabelled == (LEFT_OUT if labelled == VALIDATION else UNLABELLED_ROLE)


def test_a_group_of_two_classes_counts_for_the_one_that_is_rarer_so_far() -> None:
    """Though the later slices, by themselves, have more of it."""
    labels = [*["rare"] * 3, *["common"] * 20, *["rare"] * 4, "common"]
    groups = [*[f"g{row}" for row in range(23)], *["later"] * 5]
    generations = [0] * 23 + [1] * 5
    by_class = _groups_by_class(labels, groups, generations, purpose="test", seed=0)
    members = {name: [group.slices for group in found] for name, found in by_class.items()}
    assert [23, 24, 25, 26, 27] in members["rare"]


def test_the_test_draw_is_stratified_and_keeps_groups_together() -> None:
    labels, groups = slices(100, group_size=5)
    held_out = draw_test(labels, groups, fraction=0.25, seed=0)
    for name in ("a", "b", "c"):
        assert held_out[np.array(labels) == name].sum() == 25
    for group in set(groups):
        assert len({bool(held_out[row]) for row in range(300) if groups[row] == group}) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_patient_with_the_last_slices_of_a_class_is_not_held_out(seed: int) -> None:
    # The rare class has two patients: one of them has all slices of another class, too.
    labels = [*"aaab", *["b", *"c" * 10], *["c"] * 60]
    groups = [*["p1"] * 4, *["p2"] * 11, *[f"p{3 + number // 6}" for number in range(60)]]
    held_out = draw_test(labels, groups, fraction=0.2, seed=seed)
    out = {name for name, is_out in zip(labels, held_out, strict=True) if is_out}
    left = {name for name, is_out in zip(labels, held_out, strict=True) if not is_out}
    assert left == {"a", "b", "c"}
    assert out == {"b", "c"}  # of the second patient, whose slices both classes can spare
    # Neither of two patients can go who have the only slices of a class each.
    assert not draw_test([*"abc", *"abd"], [*"pppqqq"], fraction=0.5, seed=seed).any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("before", [{}, {"q": True}])
def test_no_class_loses_its_last_slices_with_those_of_two_rarer_ones(
    before: dict[str, bool], seed: int
) -> None:
    """Two patients have all slices of a class, and the smaller part of a rarer one each."""
    p, r, q, s = [*"c" * 10, "x"], ["x"] * 12, [*"c" * 10, "y"], ["y"] * 12
    labels = [*p, *r, *q, *s]
    groups = [*"p" * 11, *"r" * 12, *"q" * 11, *"s" * 12]
    held_out = draw_test(labels, groups, before=before, fraction=0.0, seed=seed)
    left = {name for name, is_out in zip(labels, held_out, strict=True) if not is_out}
    assert left == {"c", "x", "y"}
    out = {name for name, is_out in zip(groups, held_out, strict=True) if is_out}
    assert len(out & {"p", "q"}) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_class_whose_patients_count_for_other_classes_is_tested(seed: int) -> None:
    """Of its two patients, one has slices of a rarer class, and counts for that."""
    labels = [*"xxxxxx", *"xxxxxyy", *"yyy", *"z" * 40]
    groups = ["p0"] * 6 + ["p1"] * 7 + ["p2"] * 3 + [f"q{row // 4}" for row in range(40)]
    held_out = draw_test(labels, groups, fraction=0.2, seed=seed)
    for is_out in (True, False):
        assert {labels[row] for row in np.flatnonzero(held_out == is_out)} == set("xyz")


@pytest.mark.parametrize("seed", range(3))
def test_the_last_unlabelled_slices_are_no_reason_to_stay_in_training(seed: int) -> None:
    labels, groups = ["a", None, "a", "a", "a"], [*"pp", *"qqq"]
    held_out = draw_test(labels, groups, fraction=0.0, seed=seed)
    assert held_out.tolist() == [True, True, False, False, False]


def test_the_test_draw_depends_on_the_seed() -> None:
    labels, groups = slices()
    draws = [draw_test(labels, groups, fraction=0.2, seed=seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("seed", range(3))
def test_two_patients_of_a_class_are_one_to_learn_from_and_one_to_test(seed: int) -> None:
    labels = [name for name in "abcd" for _ in range(8)] + ["e"] * 4
    groups = [f"{name}{number // 4}" for name in "abcd" for number in range(8)] + ["e"] * 4
    held_out = draw_test(labels, groups, fraction=0.2, seed=seed)
    for name in "abcd":
        assert held_out[np.array(labels) == name].sum() == 4
    assert not held_out[np.array(labels) == "e"].any()  # there would be nothing to learn from


@pytest.mark.parametrize("seed", range(5))
def test_what_was_drawn_before_stays_and_the_new_fill_up(seed: int) -> None:
    labels, groups = ["a"] * 6, ["old", "old", "new", "new", "newer", "newest"]
    generations = [0, 0, 1, 1, 1, 1]
    kept = draw_test(labels, groups, generations, {"old": False}, fraction=0.2, seed=seed)
    assert not kept[:2].any()
    assert kept[2:].any()  # now that there are others
    alone = draw_test(
        labels[:4], groups[:4], generations[:4], {"old": True}, fraction=0.9, seed=seed
    )
    assert alone.tolist() == [True, True, False, False]  # there is one to learn from


@pytest.mark.parametrize("seed", range(3))
def test_a_class_that_is_tested_already_needs_no_new_slice_and_an_untested_one_does(
    seed: int,
) -> None:
    def new_is_held_out(**before: bool) -> bool:
        labels, groups = ["a"] * (len(before) + 1), [*before, "new"]
        generations = [0] * len(before) + [1]
        return bool(draw_test(labels, groups, generations, before, fraction=0.0, seed=seed)[-1])

    assert not new_is_held_out(old=True, other=False)
    assert new_is_held_out(old=False)


def test_of_groups_that_come_later_a_larger_test_draw_holds_out_more() -> None:
    labels, groups = ["a"] * 8, ["old", *[f"new{row}" for row in range(7)]]
    for seed in range(5):
        smaller = np.zeros(8, np.bool_)
        for fraction in (0.5, 0.9, 1.0):
            held_out = draw_test(
                labels, groups, [0] + [1] * 7, {"old": True}, fraction=fraction, seed=seed
            )
            assert (held_out >= smaller).all()
            smaller = held_out
        assert smaller.sum() == 7  # one is left to learn from


def test_new_slices_move_no_old_one_in_any_draw() -> None:
    labels, groups = slices(100, group_size=2)
    new_labels, new_groups = slices(37, group_size=1)
    all_labels = labels + new_labels
    all_groups = groups + [f"new-{group}" for group in new_groups]
    generations = [0] * len(labels) + [1] * len(new_labels)
    for fraction in (0.05, 0.2, 0.5):
        old = draw_roles(
            labels, groups, labelled_fraction=fraction, validation_fraction=0.2, seed=3
        )
        grown = draw_roles(
            all_labels,
            all_groups,
            generations,
            labelled_fraction=fraction,
            validation_fraction=0.2,
            seed=3,
        )
        assert grown[: len(old)] == old
        before = draw_test(labels, groups, fraction=fraction, seed=3)
        after = draw_test(all_labels, all_groups, generations, fraction=fraction, seed=3)
        np.testing.assert_array_equal(after[: len(before)], before)
    new_in_test = draw_test(all_labels, all_groups, generations, fraction=0.25, seed=3)[
        len(labels) :
    ]
    assert 25 <= new_in_test.sum() <= 31


@pytest.mark.parametrize("joined", range(0, 60, 7))
def test_a_patient_who_comes_back_moves_nobody_else(joined: int) -> None:
    sizes = np.random.default_rng(0).integers(2, 20, size=60)
    labels: list[str | None] = []
    groups: list[str] = []
    for patient, size in enumerate(sizes):  # class "rare" has the fewest slices, for now
        labels += [("rare" if patient % 4 == 0 else "b" if patient % 2 else "a")] * size
        groups += [f"p{patient:02d}"] * size
        labels[-1] = "a"  # most patients have slices of two classes
    new = 700  # of which "rare" is the commonest class
    grown_labels, grown_groups = [*labels, *["rare"] * new], [*groups, *[f"p{joined:02d}"] * new]
    generations = [0] * len(labels) + [1] * new
    after = roles(grown_labels, grown_groups, 0.3, generations=generations)
    assert after[: len(labels)] == roles(labels, groups, 0.3)
    assert set(after[len(labels) :]) == {after[groups.index(f"p{joined:02d}")]}
    was_drawn = draw_test(labels, groups, fraction=0.2, seed=1)
    is_drawn = draw_test(grown_labels, grown_groups, generations, fraction=0.2, seed=1)
    np.testing.assert_array_equal(is_drawn[: len(labels)], was_drawn)


def test_an_old_group_that_gets_its_first_label_is_drawn_like_a_new_one() -> None:
    labels, groups = slices(20)
    labels, groups = [*labels, None], [*groups, "late"]
    generations = [*[0] * len(labels), 1]
    after = roles([*labels, "a"], [*groups, "late"], 1.0, generations=generations)
    assert after[:60] == roles(labels, groups, 1.0)[:60]
    assert after[-1] in {LABELLED, VALIDATION}


def test_draws_stay_nested_over_generations_of_single_slices() -> None:
    labels: list[str | None] = ["a", "b"] * 60
    groups = [f"{number:03d}" for number in range(120)]
    generations = [number // 2 for number in range(120)]
    previous: set[int] = set()
    for fraction in (0.1, 0.2, 0.5, 1.0):
        drawn = draw_roles(
            labels,
            groups,
            generations,
            labelled_fraction=fraction,
            validation_fraction=0.2,
            seed=0,
        )
        assert previous <= readable(drawn)
        previous = readable(drawn)
        assert abs(len(previous) - 120 * fraction) <= 16


def test_an_unlabelled_slice_inherits_what_most_labelled_ones_of_its_subject_are_called() -> None:
    rows = [
        ("anna", LABELLED, "a", "k0"),
        ("anna", LABELLED, "a", "k1"),
        ("anna", LABELLED, "b", "k2"),
        ("anna", UNLABELLED_ROLE, None, "k3"),
        ("anna", VALIDATION, "a", "k4"),
        ("anna", UNLABELLED_ROLE, None, "k4"),  # a mirrored copy of the validation slice
        ("ben", LABELLED, "a", "k6"),
        ("ben", LABELLED, "b", "k7"),
        ("ben", UNLABELLED_ROLE, None, "k8"),  # as many of one as of the other
        ("cleo", VALIDATION, "a", "k9"),
        ("cleo", UNLABELLED_ROLE, None, "k10"),  # validation labels are not for training
        ("dora", UNLABELLED_ROLE, "a", "k11"),  # nor is its own
        (None, LABELLED, "b", "k12"),
        (None, UNLABELLED_ROLE, None, "k13"),
    ]
    subjects, drawn, labels, related_groups = zip(*rows, strict=True)
    inherited = inherited_labels(subjects, drawn, labels, related_groups)
    assert inherited[3] == "a"
    assert [label for row, label in enumerate(inherited) if row != 3] == [None] * 13


@pytest.mark.parametrize("seed", range(20))
def test_of_a_class_with_few_groups_the_smallest_is_held_out(seed: int) -> None:
    groups = [name for name, size in (("a", 80), ("b", 12), ("c", 8)) for _ in range(size)]
    held_out = draw_test(["rare"] * 100, groups, fraction=0.01, seed=seed)
    assert {groups[row] for row in np.flatnonzero(held_out)} == {"c"}


def test_a_class_of_groups_that_were_all_held_out_stays_so() -> None:
    """As the unlabelled slices, once the last training slice is labelled."""
    labels, groups = [None, None, "a", "a"], ["p1", "p2", "p3", "p4"]
    before = {"p1": True, "p2": True, "p3": False}
    held_out = draw_test(labels, groups, before=before, fraction=0.5, seed=0)
    assert held_out.tolist()[:3] == [True, True, False]
