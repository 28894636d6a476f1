"""What to label next: the slices that a model is least sure of, spread over clusters and groups."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BREADTH = 3
"""Slices that compete for each place. Citovsky et al. took 1.25 to 10; nobody has tuned it here."""


def margin_uncertainty(probabilities: NDArray[np.floating]) -> NDArray[np.float32]:
    """(N,) from 0, sure, to 1: one minus the lead of the best class over the second of (N, C)."""
    second, first = np.sort(probabilities, axis=1)[:, -2:].T
    return np.asarray(1 - (first - second), dtype=np.float32)


def choose_to_label(
    uncertainty: NDArray[np.floating],  # (N,)
    clusters: NDArray[np.integer],  # (N,)
    groups: Sequence[Sequence[str | None]],  # each (N,): copies, subjects; None is of no group
    known: Sequence[set[str]],  # of each kind of group: those with a labelled slice
    num_slices: int,
) -> NDArray[np.int64]:
    """Rows of the slices to label, the most useful first; at most ``num_slices``.

    After Cluster-Margin (Citovsky et al. 2021, "Batch active learning at scale"): a few times as
    many of the most uncertain slices as are asked for compete, and clusters take turns, each with
    its most uncertain slice. Departures: the clusters are the mixture's, which users know; and a
    slice stands back, behind all clusters' turns, for each slice of one of its groups that is
    labelled or more uncertain, since a copy or a neighbour teaches little.
    """
    order = np.argsort(-uncertainty, kind="stable")
    turn = _turns(order, groups, known)
    order = order[np.argsort(turn[order], kind="stable")][: _BREADTH * num_slices]
    # One of each group first, of which clusters take turns, each with its most uncertain one.
    place = np.empty(len(order), dtype=np.int64)
    passed: Counter[tuple[int, int]] = Counter()
    for position, at in enumerate(zip(clusters[order].tolist(), turn[order].tolist(), strict=True)):
        place[position] = passed[at]
        passed[at] += 1
    ranked = np.lexsort((-uncertainty[order], place, turn[order]))
    return np.asarray(order[ranked][:num_slices], dtype=np.int64)


def _turns(
    order: NDArray[np.int64],
    groups: Sequence[Sequence[str | None]],
    known: Sequence[set[str]],
) -> NDArray[np.int64]:
    """(N,): how many slices of one of its groups come before each slice, in that order."""
    counts = [Counter(dict.fromkeys(names, 1)) for names in known]
    turn = np.zeros(len(order), dtype=np.int64)
    for row in order.tolist():
        for names, count in zip(groups, counts, strict=True):
            name = names[row]
            if name is not None:
                turn[row] = max(turn[row], count[name])
                count[name] += 1
    return turn
