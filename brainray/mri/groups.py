"""Names for groups of copies, of subjects, and of slices that a split must keep together."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def first_connected(
    num_items: int, first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The smallest index (N,) in the connected component of each of N items.

    Args:
        num_items: N.
        first: (P,) one end of each link.
        second: (P,) the other end.
    """
    graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(num_items,) * 2)
    _, component = connected_components(graph, directed=False)
    _, earliest, group = np.unique(component, return_index=True, return_inverse=True)
    return np.asarray(earliest[group], dtype=np.int64)


def connected_groups(
    names: Sequence[str], first: NDArray[np.int64], second: NDArray[np.int64]
) -> list[str]:
    """The smallest name in the connected component of each of N items.

    Args:
        names: N names; items with equal names are connected.
        first: (P,) one end of each link.
        second: (P,) the other end.
    """
    earliest: dict[str, int] = {}
    same = np.array([earliest.setdefault(name, row) for row, name in enumerate(names)], np.int64)
    first = np.concatenate([same, first])
    second = np.concatenate([np.arange(len(names)), second])
    groups = first_connected(len(names), first, second).tolist()
    smallest: dict[int, str] = {}
    for group, name in zip(groups, names, strict=True):
        smallest[group] = min(name, smallest.get(group, name))
    return [smallest[group] for group in groups]


def conflicting_groups(groups: Sequence[str], labels: Sequence[str | None]) -> set[str]:
    """The groups whose slices have more than one label.

    Args:
        groups: (N,) of each slice, such as its copies.
        labels: (N,) None if unknown.
    """
    names: dict[str, set[str]] = {}
    for group, label in zip(groups, labels, strict=True):
        if label is not None:
            names.setdefault(group, set()).add(label)
    return {group for group, found in names.items() if len(found) > 1}


def joint_groups(*memberships: Sequence[str | None]) -> list[str]:
    """Joint groups: slices are connected by any shared id; None connects nothing.

    The id of a joint group is its smallest id in the first membership.
    """
    first_slice: dict[tuple[int, str], int] = {}
    links = [
        (first_slice.setdefault((level, identity), index), index)
        for level, membership in enumerate(memberships)
        for index, identity in enumerate(membership)
        if identity is not None
    ]
    first, second = np.array(links, dtype=np.int64).reshape(-1, 2).T
    return connected_groups([str(identity) for identity in memberships[0]], first, second)


def earliest_names(groups: Sequence[str], previous: Sequence[str | None]) -> dict[str, str]:
    """The smallest previous name of each group's members; the group's own if none has one."""
    earliest: dict[str, str] = {}
    for group, name in zip(groups, previous, strict=True):
        if name is not None:
            earliest[group] = min(name, earliest.get(group, name))
    return {group: earliest.get(group, group) for group in groups}


def keep_names(groups: Sequence[str], previous: Sequence[str | None]) -> list[str]:
    """Rename each group to its earliest name.

    A group thus keeps its name, and with it its place in every draw, when new slices join it. If
    one has come apart, because a subject was corrected or a slice was removed, only one of its
    parts keeps the name: the part that is named so anyway, else the first.
    """
    kept: dict[str, str] = {}
    taken = set(groups)
    for group, name in sorted(earliest_names(groups, previous).items()):
        kept[group] = group if name in taken else name
        taken.add(name)
    return [kept[group] for group in groups]
