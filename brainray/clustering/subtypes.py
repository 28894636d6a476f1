"""Sub-types: clusters within a class, and whether they recur in runs with other seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brainray.clustering.metrics import clustering_metrics

STABLE = 0.75
"""Mean Jaccard index at which a cluster counts as stable: Hennig 2007, section 3.2."""


@dataclass(frozen=True)
class SubType:
    """One of several clusters that are mapped to the same class."""

    cluster: int
    size: int  # slices
    stability: float | None
    """Mean over the other runs of the Jaccard index with the most similar cluster of that run;
    None without other runs."""

    @property
    def is_stable(self) -> bool:
        return self.stability is not None and self.stability >= STABLE


@dataclass(frozen=True)
class ClassSubTypes:
    """The clusters that are mapped to one class."""

    name: str
    ari: float | None  # mean over the other runs, on the slices of the class; None without runs
    subtypes: list[SubType]  # by size, largest first


def find_subtypes(
    clusters: NDArray[np.integer],  # (N,)
    classes: Sequence[str],  # (N,) class that the slice's cluster is mapped to
    others: Sequence[NDArray[np.integer]],  # (N,) clusters of the same slices in other runs
) -> list[ClassSubTypes]:
    """Classes with more than one cluster, in the order of their names.

    No labels are read: the slices of a class and of a cluster do not depend on them.
    """
    names = np.asarray(classes)
    found = []
    for name in sorted(set(classes)):
        in_class = names == name
        numbers, sizes = np.unique(clusters[in_class], return_counts=True)
        if len(numbers) < 2:
            continue
        agreements = [
            clustering_metrics(clusters[in_class], other[in_class])["ari"] for other in others
        ]
        subtypes = [
            SubType(int(number), int(size), _stability(clusters == number, others))
            for number, size in sorted(
                zip(numbers.tolist(), sizes.tolist(), strict=True), key=lambda pair: -pair[1]
            )
        ]
        found.append(ClassSubTypes(name, _mean(agreements), subtypes))
    return found


def _stability(members: NDArray[np.bool_], others: Sequence[NDArray[np.integer]]) -> float | None:
    """Mean over the other runs of the largest Jaccard index with a set of slices (N,)."""
    best = []
    for other in others:
        counts = np.bincount(other)
        shared = np.bincount(other[members], minlength=len(counts))
        united = counts + members.sum() - shared
        best.append(float((shared / united).max()))
    return _mean(best)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
