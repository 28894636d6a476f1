"""Draw the test split, the labels and the validation set in the order of a seeded hash of groups.

A group of near-duplicates or of one subject is drawn as a whole. A draw takes the first groups of
an order that does not depend on the fraction, so a smaller draw of labels is part of a larger one.
The test split is drawn in stretches of successive files, where there are any.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from brainray.errors import ConfigError, DataError
from brainray.mri.file_order import in_stretches, sides_of_neighbours
from brainray.schema import LABELLED, LEFT_OUT, UNLABELLED_ROLE, VALIDATION

_TOLERANCE = 0.15  # relative, of the validation share
_NO_ORDER = np.empty((0, 2), np.int64)


def draw_test(
    labels: Sequence[str | None],
    groups: Sequence[str],
    generations: Sequence[int] | None = None,
    before: Mapping[str, bool] | None = None,
    successive: NDArray[np.int64] = _NO_ORDER,
    *,
    fraction: float,
    seed: int,
) -> NDArray[np.bool_]:
    """Whether each slice is held out for testing: about ``fraction`` of every class, whole groups.

    Of a class with slices in two or more groups, at least one is held out and at least one is not,
    as far as the groups drawn ``before`` and the last slices of other classes allow: a group that
    has them is not held out. Nor is the only group of a class. Unlabelled slices are drawn like a
    separate class. A new group between files of one side joins that side.

    Args:
        labels: of each slice; None if unknown.
        groups: of each slice, drawn as a whole.
        generations: as in ``draw_roles``.
        before: whether a group, by name, was held out in an earlier draw; this is kept.
        successive: (M, 2) rows of slices from successive files, which are drawn in stretches.
        fraction: of the slices of a class.
        seed: of the hash order.
    """
    before = before or {}
    beside = sides_of_neighbours(before, groups, successive)
    by_class = _groups_by_class(
        labels, groups, generations, purpose="test", seed=seed, successive=successive
    )
    held_out = _HeldOut(labels, [before.get(group, False) for group in groups])
    new_by_class: dict[str | None, list[_Group]] = {}
    for label, members in by_class.items():
        names = [groups[group.slices[0]] for group in members]
        decided = [before[name] for name in names if name in before]
        new = [
            (group, beside.get(name, group.place < fraction))
            for group, name in zip(members, names, strict=True)
            if name not in before
        ]
        new.sort(key=lambda drawn: drawn[0].place)
        new_by_class[label] = [group for group, _ in new]
        most = len(new) - int(all(decided))
        for group, is_drawn in new:
            if is_drawn and most > 0 and held_out.can_spare(group):
                held_out.add(group)
                most -= 1
    for label in held_out.untested_classes():
        held_out.add_smallest(label, new_by_class)
    return held_out.mask


def draw_roles(
    labels: Sequence[str | None],
    groups: Sequence[str],
    generations: Sequence[int] | None = None,
    *,
    related_groups: Sequence[str] | None = None,
    leave_out_related: bool = False,
    labelled_fraction: float,
    validation_fraction: float,
    seed: int,
) -> list[str]:
    """Role of each training slice: labelled, validation (also labelled) or unlabelled.

    Per class, ``labelled_fraction`` of its slices is drawn in the hash order of their groups, at
    least two groups. Every n-th related group of that order, from the second on, is validation,
    where n is the rounded inverse of ``validation_fraction``. Whether a group is used for
    validation does not depend on ``labelled_fraction``, so the labelled and the validation sets are
    each nested. In a drawn group, slices without a label stay unlabelled; in a validation group,
    whose slices must not be fitted, they are left out. (A warm-up reads no labels and sees every
    slice.)

    Args:
        labels: of each slice; None if unknown.
        groups: of each slice, drawn as a whole.
        related_groups: of each slice, wider than ``groups``; never split between labelled and
            validation. By default each group is only related to itself.
        leave_out_related: also leave out slices that share the related group of validation slices
            and are not drawn.
        generations: the preprocessing run in which each slice was added. Each generation is drawn
            from separately, so that a later one does not change the roles of an earlier one.
        labelled_fraction: of the labelled slices.
        validation_fraction: of the drawn related groups.
        seed: of the hash order.

    Raises:
        DataError: there are no labels, a class has a single group of slices, or the draw of whole
            groups leaves a class without a slice for training or for validation.
    """
    roles = [UNLABELLED_ROLE] * len(labels)
    by_class = _groups_by_class(labels, groups, generations, purpose="labels", seed=seed)
    by_class.pop(None, None)
    if not by_class:
        raise DataError("no labelled training slice: provide class folders or a labels table")
    related_groups = groups if related_groups is None else related_groups
    validates = _related_groups_that_validate(
        by_class, related_groups, _validation_stride(validation_fraction)
    )
    related_of_class: defaultdict[str | None, set[str]] = defaultdict(set)
    for name, own in zip(labels, related_groups, strict=True):
        related_of_class[name].add(own)
    for name, members in by_class.items():
        related_of_members = [related_groups[group.slices[0]] for group in members]
        if len(related_of_class[name]) < 2:
            raise DataError(
                f"class {name!r} has {list(labels).count(name)} labelled training slice(s), all of "
                "one subject or group of copies, but training and validation need one each (slices "
                "of the test part do not count): label more of them, or drop the class, as the "
                "source calls it, in a store of another name with classes.map.CLASS=null, or make "
                "one with a smaller split.test_fraction if brainray draws the test part"
            )
        # One for training and one for validation, however small the fraction.
        uses = [validates[own] for own in related_of_members]
        always = {uses.index(use) for use in (False, True) if use in uses}
        for position, (group, own) in enumerate(zip(members, related_of_members, strict=True)):
            if group.place >= labelled_fraction and position not in always:
                continue
            role = VALIDATION if validates[own] else LABELLED
            without_label = LEFT_OUT if validates[own] else UNLABELLED_ROLE
            for index in group.slices:
                roles[index] = without_label if labels[index] is None else role
    _check_every_class(labels, roles)
    if leave_out_related:
        validated = {
            own for own, role in zip(related_groups, roles, strict=True) if role == VALIDATION
        }
        for index, own in enumerate(related_groups):
            if own in validated and roles[index] == UNLABELLED_ROLE:
                roles[index] = LEFT_OUT
    return roles


def _check_every_class(labels: Sequence[str | None], roles: Sequence[str]) -> None:
    for name in sorted(set(labels) - {None}, key=str):
        drawn = {role for role, label in zip(roles, labels, strict=True) if label == name}
        if not {LABELLED, VALIDATION} <= drawn:
            raise DataError(
                f"the draw of whole subjects leaves class {name!r} without a slice for training or "
                "validation: raise split.labelled_fraction, label more subjects or try another "
                "split.seed"
            )


def inherited_labels(
    subjects: Sequence[str | None],
    roles: Sequence[str],
    labels: Sequence[str | None],
    related_groups: Sequence[str],
) -> list[str | None]:
    """The most frequent label of its subject for each unlabelled slice, else None.

    Only slices whose role is labelled count, not those of the validation set. If two classes are
    equally frequent, no label is inherited. Nor is one by slices related to a validation slice:
    learning the label of its mirrored or rotated copy would be learning its own.

    Args:
        subjects: of each training slice, given or estimated; None if unknown.
        roles: as returned by `draw_roles`.
        labels: None if unknown or not to be read.
        related_groups: as for `draw_roles`, such as copies in any orientation.
    """
    known: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for subject, role, label in zip(subjects, roles, labels, strict=True):
        if subject is not None and role == LABELLED and label is not None:
            known[subject][label] += 1
    names: dict[str, str] = {}
    for subject, counts in known.items():
        first, *others = counts.most_common(2)
        if not others or first[1] > others[0][1]:
            names[subject] = first[0]
    validated = {own for own, role in zip(related_groups, roles, strict=True) if role == VALIDATION}
    return [
        names.get(subject)
        if subject is not None and role == UNLABELLED_ROLE and own not in validated
        else None
        for subject, role, own in zip(subjects, roles, related_groups, strict=True)
    ]


@dataclass(frozen=True)
class _Group:
    """Slices that are drawn together."""

    slices: list[int]
    generation: int
    place: float  # in [0, 1): a draw of a fraction takes the groups below it


class _HeldOut:
    """The slices held out so far, and how many of each class are left to learn from."""

    def __init__(self, labels: Sequence[str | None], mask: Sequence[bool]) -> None:
        self.mask = np.array(mask, dtype=np.bool_)
        self._labels = labels
        self._num_slices = Counter(labels)
        self._left = Counter(label for label, out in zip(labels, mask, strict=True) if not out)

    def can_spare(self, group: _Group) -> bool:
        """Whether no class would lose its last slices with those of the group."""
        own = Counter(self._labels[index] for index in group.slices)
        return all(count < self._left[label] for label, count in own.items() if label is not None)

    def add(self, group: _Group) -> None:
        self.mask[group.slices] = True
        self._left.subtract(self._labels[index] for index in group.slices)

    def untested_classes(self) -> Iterator[str | None]:
        """Those without a held-out slice, the rarest first; None for unlabelled slices."""
        for label in sorted(
            self._num_slices, key=lambda label: (self._num_slices[label], str(label))
        ):
            if self._left[label] == self._num_slices[label]:
                yield label

    def add_smallest(
        self, label: str | None, new_by_class: Mapping[str | None, list[_Group]]
    ) -> None:
        """Hold out the smallest new group of a class, else of those that have slices of it."""
        candidates = [
            (name != label, len(group.slices), group.place, group)
            for name, new in new_by_class.items()
            for group in new
            if 0 < self._num_of(label, group) < self._left[label] and self.can_spare(group)
        ]
        if candidates:
            self.add(min(candidates, key=lambda candidate: candidate[:3])[-1])

    def _num_of(self, label: str | None, group: _Group) -> int:
        return sum(self._labels[index] == label for index in group.slices)


@dataclass(frozen=True)
class _Unplaced:
    slices: list[int]
    num_founders: int  # slices that were present when the group was first seen


def _validation_stride(fraction: float) -> int:
    """The n of the validation part of one in n that is nearest to a fraction of at most a half."""
    return round(1 / fraction)


def check_validation_share(fraction: float) -> None:
    """Raises ConfigError if a fraction is far from those that can be held out for validation."""
    if abs(1 / _validation_stride(fraction) - fraction) > _TOLERANCE * fraction:
        n = math.floor(1 / fraction)
        raise ConfigError(
            f"split.validation_fraction={fraction:g}: one group of slices in n is held out, and "
            f"this is far from 1/{n} and 1/{n + 1}: use {1 / n:.2g} or {1 / (n + 1):.2g}"
        )


def _related_groups_that_validate(
    by_class: dict[str | None, list[_Group]], related_groups: Sequence[str], stride: int
) -> dict[str, bool]:
    """Whether each related group is used for validation: every ``stride``-th of its class.

    The first to be used is the second. Groups of several classes count for the class in which they
    first appeared, so that neither the fraction drawn nor later slices change their role.
    """
    home: dict[str, tuple[int, str]] = {}
    for name, members in by_class.items():
        for group in members:
            own, here = related_groups[group.slices[0]], (group.generation, str(name))
            home[own] = min(home.get(own, here), here)
    return {
        own: place % stride == 1
        for name, members in by_class.items()
        for place, own in enumerate(
            dict.fromkeys(related_groups[group.slices[0]] for group in members)
        )
        if home[own][1] == str(name)
    }


def _groups_by_class(
    labels: Sequence[str | None],
    groups: Sequence[str],
    generations: Sequence[int] | None,
    *,
    purpose: str,
    seed: int,
    successive: NDArray[np.int64] = _NO_ORDER,
) -> dict[str | None, list[_Group]]:
    """Groups of each class, by generation: those of ``successive`` files in stretches, then the
    others in hash order.

    A group with some unlabelled slices counts for the class of its labelled ones. A group of
    several classes, such as a patient with and without a visible lesion, counts for the rarest of
    them. Its generation is that of its oldest slice (when drawing labels, of its oldest labelled
    slice). Slices that join later get the role of the group, but affect neither its class nor its
    size in the order, as this would move other groups.
    """
    slice_generations = [0] * len(labels) if generations is None else generations
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    arrived: dict[int, Counter[str]] = {
        generation: Counter() for generation in sorted(set(slice_generations))
    }
    for label, generation in zip(labels, slice_generations, strict=True):
        if label is not None:
            arrived[generation][label] += 1
    frequency = dict(zip(arrived, accumulate(arrived.values()), strict=True))  # up to each
    founded: dict[str, int] = {}
    for group, indices in members.items():
        counted = [i for i in indices if labels[i] is not None] if purpose == "labels" else []
        founded[group] = min(slice_generations[i] for i in counted or indices)
    ordered: defaultdict[str | None, defaultdict[tuple[int, bool], list[_Unplaced]]] = defaultdict(
        lambda: defaultdict(list)
    )
    place = {name: _uniform(purpose, seed, name) for name in members}
    stretches = dict.fromkeys(in_stretches(place, groups, successive))
    others = sorted(members.keys() - stretches.keys(), key=lambda name: place[name])
    for group in sorted([*stretches, *others], key=lambda name: founded[name]):
        generation = founded[group]
        founders = [i for i in members[group] if slice_generations[i] <= generation]
        names = {label for i in founders if (label := labels[i]) is not None}
        label = min(names, key=lambda name: (frequency[generation][name], name), default=None)
        ordered[label][generation, group in stretches].append(
            _Unplaced(members[group], len(founders))
        )
    return {
        label: [
            group
            for (generation, _), unplaced in by_part.items()
            for group in _placed(unplaced, generation, _turn(purpose, seed, generation))
        ]
        for label, by_part in ordered.items()
    }


def _placed(unplaced: list[_Unplaced], generation: int, turn: float) -> list[_Group]:
    """Place groups consecutively on a circle of length 1, each as long as its share of slices.

    The place of a group is its middle, so that a draw is accurate to half a group.
    """
    num_slices = sum(group.num_founders for group in unplaced)
    passed, placed = 0, []
    for group in unplaced:
        middle = (passed + group.num_founders / 2) / num_slices
        placed.append(_Group(group.slices, generation, (middle + turn) % 1.0))
        passed += group.num_founders
    return placed


def _turn(purpose: str, seed: int, generation: int) -> float:
    """Offset of a generation's circle: random for later ones, which may have a single group."""
    if generation == 0:
        return 0.0
    return _uniform(f"{purpose}-turn", seed, str(generation))


def _uniform(purpose: str, seed: int, group: str) -> float:
    """A number in [0, 1) by hash."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{group}".encode()).hexdigest()
    return int(digest[:13], 16) / 16**13
