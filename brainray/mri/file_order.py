"""Files numbered one after another, which mostly show one subject.

Exports number the slices of a series, and collections the subjects. Where similarity recognises too
few slices of a subject, a test set of whole stretches of this order shares fewer subjects with
training than one of slices from everywhere: blocked cross-validation (Roberts et al. 2017,
*Ecography* 40, 913).
"""

import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_NUMBERS = re.compile(r"(\d+)", re.ASCII)
_STRETCH = 100  # slices: long against a series, whose parting its two ends risk


def successive_files(names: Sequence[str | None]) -> NDArray[np.int64]:
    """(M, 2) rows of names that differ in numbers only, each with the next by these numbers.

    Args:
        names: (N,) paths, with ``/``; None if the file's subject is known otherwise.
    """
    numbered: defaultdict[tuple[str, ...], list[tuple[list[int], str, int]]] = defaultdict(list)
    for row, name in enumerate(names):
        if name is not None:
            text, numbers = (_NUMBERS.split(name)[start::2] for start in (0, 1))
            numbered[tuple(text)].append(([int(number) for number in numbers], name, row))
    pairs = [
        (first, second)
        for series in numbered.values()
        for (_, _, first), (_, _, second) in pairwise(sorted(series))
    ]
    return np.array(pairs, np.int64).reshape(-1, 2)


def in_stretches(
    place: Mapping[str, float], groups: Sequence[str], successive: NDArray[np.int64]
) -> list[str]:
    """Groups with successive files in others, in a random order in which these follow one another.

    A stretch starts at a group that is in none, with a probability in proportion to its links and
    in inverse proportion to the length of a stretch there, so that every file is as likely as
    another (Efraimidis & Spirakis 2006). It grows by the group that has the largest share of its
    links in it, until it has a hundred slices or there is none.

    Args:
        place: of every group, uniform in [0, 1).
        groups: (N,) of each slice.
        successive: (M, 2) rows of slices from successive files.
    """
    links: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for first, second in successive:
        one, other = groups[first], groups[second]
        if one != other:
            links[one][other] += 1
            links[other][one] += 1
    sizes = Counter(groups)
    num_links = {name: own.total() for name, own in links.items()}
    length = {name: min(size, _STRETCH) for name, size in _sizes_of_series(links, sizes).items()}
    taken: dict[str, None] = {}  # in order
    for start in sorted(
        links, key=lambda name: -math.log1p(-place[name]) * length[name] / num_links[name]
    ):
        _grow_stretch(start, links, num_links, sizes, taken)
    return list(taken)


def _sizes_of_series(links: Mapping[str, Counter[str]], sizes: Mapping[str, int]) -> dict[str, int]:
    """Number of slices of the groups that each group's links lead to, however far."""
    of_series: dict[str, int] = {}
    for start in links:
        if start not in of_series:
            reached = {start: None}
            queue = [start]
            while queue:
                new = [other for other in links[queue.pop()] if other not in reached]
                reached |= dict.fromkeys(new)
                queue += new
            of_series |= dict.fromkeys(reached, sum(sizes[name] for name in reached))
    return of_series


def _grow_stretch(
    start: str,
    links: Mapping[str, Counter[str]],
    num_links: Mapping[str, int],
    sizes: Mapping[str, int],
    taken: dict[str, None],
) -> None:
    num_slices = 0
    num_inward: Counter[str] = Counter()  # links of each group into the stretch
    queue = [(0.0, 0, start)]  # of groups outside, the most linked first, else the first reached
    while queue and num_slices < _STRETCH:
        _, _, group = heapq.heappop(queue)
        if group in taken:
            continue
        taken[group] = None
        num_slices += sizes[group]
        for other, count in links[group].items():
            num_inward[other] += count
            share = num_inward[other] / num_links[other]
            heapq.heappush(queue, (-share, len(taken), other))


def sides_of_neighbours(
    sides: Mapping[str, bool], groups: Sequence[str], successive: NDArray[np.int64]
) -> dict[str, bool]:
    """The side of groups without one all of whose links lead to groups of the same side.

    Args:
        sides: of some groups.
        groups: (N,) of each slice.
        successive: (M, 2) rows of slices from successive files.
    """
    found: defaultdict[str, set[bool | None]] = defaultdict(set)
    for first, second in successive:
        for own, other in ((groups[first], groups[second]), (groups[second], groups[first])):
            if own != other and own not in sides:
                found[own].add(sides.get(other))
    return {name: True in around for name, around in found.items() if around in ({True}, {False})}
