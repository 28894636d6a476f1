"""Active learning: choose the least certain slices to label, spread over clusters and groups."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BREADTH = 3
"""Candidates per requested slice. Citovsky et al. used 1.25 to 10; the value is not tuned here."""


def margin_uncertainty(probabilities: NDArray[np.floating]) -> NDArray[np.float32]:
    """Uncertainty (N,) of (N, C), 0 to 1: one minus the margin of the best class to the second."""
    second, first = np.sort(probabilities, axis=1)[:, -2:].T
    return np.asarray(1 - (first - second), dtype=np.float32)


def choose_to_label(
    uncertainty: NDArray[np.floating],  # (N,)
    clusters: NDArray[np.integer],  # (N,)
    groups: Sequence[Sequence[str | None]],  # each (N,): copies, subjects; None: no group
    known: Sequence[set[str]],  # for each kind of group: those with a labelled slice
    num_slices: int,
) -> NDArray[np.int64]:
    """Rows of the slices to label, the most useful first; at most ``num_slices``.

    After Cluster-Margin (Citovsky et al. 2021, "Batch active learning at scale"): the candidates
    are a few times as many of the most uncertain slices as requested, and clusters take turns, each
    with its most uncertain slice. Departures: the clusters are those of the mixture, which users
    know; and a slice is moved back by one round of turns for each slice of one of its groups that
    is labelled or more uncertain, as a copy or a neighbour adds little information.
    """
    order = np.argsort(-uncertainty, kind="stable")
    turn = _turns(order, groups, known)
    order = order[np.argsort(turn[order], kind="stable")][: _BREADTH * num_slices]
    # First one slice per group; among these, clusters take turns with their most uncertain one.
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
    """(N,) how many slices of one of its groups precede each slice in ``order``."""
    counts = [Counter(dict.fromkeys(names, 1)) for names in known]
    turn = np.zeros(len(order), dtype=np.int64)
    for row in order.tolist():
        for names, count in zip(groups, counts, strict=True):
            name = names[row]
            if name is not None:
                turn[row] = max(turn[row], count[name])
                count[name] += 1
    return turn
