"""Draws by the order of a seeded hash of groups: of a test split, of labels, of validation.

A group of near-duplicates or of one subject is drawn as a whole. Because a draw takes the first
groups of an order that does not depend on the fraction, a smaller draw lies within a larger one.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from brainray.errors import DataError
from brainray.schema import LABELLED, LEFT_OUT, UNLABELLED_ROLE, VALIDATION


def joint_groups(*memberships: Sequence[str | None]) -> list[str]:
    """Groups that no membership straddles: slices connected by any shared id; None connects none.

    The id of a joint group is the smallest id of the first membership in it.
    """
    num_slices = len(memberships[0])
    first_slice: dict[tuple[int, str], int] = {}
    links = [
        (first_slice.setdefault((level, identity), index), index)
        for level, membership in enumerate(memberships)
        for index, identity in enumerate(membership)
        if identity is not None
    ]
    rows, columns = np.array(links, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(num_slices,) * 2)
    _, component = connected_components(graph, directed=False)
    name: dict[int, str] = {}
    for group, identity in zip(component.tolist(), memberships[0], strict=True):
        name[group] = min(name.get(group, str(identity)), str(identity))
    return [name[group] for group in component.tolist()]


def draw_test(
    labels: Sequence[str | None], groups: Sequence[str], *, fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Whether each slice is held out for testing: about ``fraction`` of every class, whole groups.

    Unlabelled slices are drawn like a class of their own.
    """
    drawn = np.zeros(len(labels), dtype=np.bool_)
    for members in _groups_by_class(labels, groups, purpose="test", seed=seed).values():
        size = sum(len(indices) for indices in members)
        for indices in _first_groups(members, fraction * size):
            drawn[indices] = True
    return drawn


def draw_roles(
    labels: Sequence[str | None],
    groups: Sequence[str],
    *,
    labelled_fraction: float,
    validation_fraction: float,
    seed: int,
) -> list[str]:
    """Role of each training slice: labelled, validation (also labelled) or unlabelled.

    Per class, the first groups in hash order until ``labelled_fraction`` of its slices is reached,
    two groups at least; every n-th of them, from the second on, is validation, with n the rounded
    inverse of ``validation_fraction``. A group's validation place does not depend on the fraction,
    so the labelled and the validation part are each nested. Groups whose slices carry different
    labels are never drawn. In a drawn group slices without a label stay unlabelled; in a validation
    group, whose slices must not be trained on, they are left out altogether.

    Raises:
        DataError: no label at all, or a class with a single group of slices.
    """
    roles = [UNLABELLED_ROLE] * len(labels)
    by_class = _groups_by_class(labels, groups, purpose="labels", seed=seed)
    by_class.pop(None, None)
    if not by_class:
        raise DataError(
            "no labelled training slice: training needs class folders or a labels table"
        )
    stride = max(2, round(1 / validation_fraction))
    for name, members in sorted(by_class.items(), key=lambda item: str(item[0])):
        if len(members) < 2:
            num_slices = sum(len(indices) for indices in members)
            raise DataError(
                f"class {name!r} has {num_slices} labelled training slice(s) that are not copies "
                "of each other; at least 2 are needed, one to learn from and one to validate: "
                "label more slices or drop the class"
            )
        size = sum(len(indices) for indices in members)
        drawn = _first_groups(members, labelled_fraction * size, at_least=2)
        for position, indices in enumerate(drawn):
            is_validation = position % stride == 1
            role = VALIDATION if is_validation else LABELLED
            without_label = LEFT_OUT if is_validation else UNLABELLED_ROLE
            for index in indices:
                roles[index] = without_label if labels[index] is None else role
    return roles


def _groups_by_class(
    labels: Sequence[str | None], groups: Sequence[str], *, purpose: str, seed: int
) -> dict[str | None, list[list[int]]]:
    """Slice indices of every group, per class, groups in hash order.

    A group with some unlabelled slices counts for the class of its labelled ones; a group with
    two classes counts as unlabelled.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    by_class: dict[str | None, list[list[int]]] = defaultdict(list)
    for group in sorted(members, key=lambda name: _hash(purpose, seed, name)):
        names = {labels[index] for index in members[group]} - {None}
        label = next(iter(names)) if len(names) == 1 else None
        by_class[label].append(members[group])
    return by_class


def _first_groups(
    members: list[list[int]], num_slices: float, at_least: int = 0
) -> list[list[int]]:
    """Leading groups until together they hold ``num_slices``, rounded to the nearest group."""
    count, taken = 0, 0
    for indices in members:
        if taken >= at_least and count + len(indices) / 2 > num_slices:
            break
        count += len(indices)
        taken += 1
    return members[:taken]


def _hash(purpose: str, seed: int, group: str) -> str:
    return hashlib.sha256(f"{purpose}:{seed}:{group}".encode()).hexdigest()
