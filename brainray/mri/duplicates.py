"""Copies of a slice: byte-identical files, and near-duplicates found by their fingerprints.

A fingerprint is the whole frame, area-averaged to 96 x 96 uint8. Near-duplicates are copies that
were re-encoded, resized, darkened or brightened, framed, captioned, cropped, mirrored or rotated.
They are found in two stages:

1. candidates: a descriptor of the bright region's layout in its own frame (centred and scaled, so
   that borders and crops hardly matter) is searched for in an index of all slices;
2. verification on the pixels: `brainray.mri.registration` aligns each pair and compares local
   structure. Neighbouring slices of a volume look alike but are kept apart.

Both stages depend only on the fingerprints, not on their order. Descriptors are vectors of small
integers, so float32 dot products are exact: neither the number of threads nor the block size
affects the result.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dctn

from brainray.config import NearDuplicateConfig
from brainray.mri import registration
from brainray.mri.neighbours import neighbour_index
from brainray.mri.row_file import Rows, SelectedRows, row_blocks
from brainray.schema import THUMBNAIL_SIDE

KINDS = ("copy", "mirrored", "rotated")
"""Names of the codes in `DuplicatePairs.kind` and `Twins.kind`: upright; mirrored at any axis,
including the diagonals; rotated by 90, 180 or 270 degrees."""
COPY, MIRRORED, ROTATED = range(3)

_READ_ROWS = 1024  # fingerprints read and described at a time: 40 MB of floats
_QUERIES_AT_ONCE = 4096  # per index search
_MAX_OF_ONE_VOLUME = 1024  # slices skipped in favour of those of other volumes
_VERIFIED_PAIRS = 256  # by a thread at a time: one block of the coarsest level

_LAYOUT_SIDE = 32  # pixels: the resolution of descriptors
_LAYOUT_MARGIN = 3  # pixels ignored on every side: borders, captions
_LAYOUT_QUANTILES = (0.6, 0.7)  # dark and bright: robust to brightness and most clipping
_LAYOUT_SPREAD = 1.7  # standard deviations that the canonical frame spans on either side
_CANONICAL_SIDE = 24  # pixels
_NUM_FREQUENCIES = 8  # along each axis
_DESCRIPTOR_LENGTH = 1000  # Euclidean; its square is below 2**24, where float32 stops being exact

_NEARLY_EQUAL = 0.95  # cosine of turned descriptors that take no place away from the other ones

_UPRIGHT = 0
_INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)  # of each orientation, see `_oriented`
_KIND_OF = (COPY, ROTATED, ROTATED, ROTATED, MIRRORED, MIRRORED, MIRRORED, MIRRORED)


OnCompared = Callable[[int, int], None]
"""Called with the number of candidates verified so far and their total number."""


@dataclass(frozen=True)
class DuplicatePairs:
    """Links between slices that are copies of each other, sorted by (first, second); length P.

    Byte-identical fingerprints are linked to the first of them, not pairwise, and only the first
    takes part in other links. This is enough to form groups.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]  # first < second
    kind: NDArray[np.int8]  # COPY, MIRRORED or ROTATED
    similarity: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.first)

    def filter_by_kind(self, *kinds: int) -> "DuplicatePairs":
        """The links of these kinds."""
        keep = np.isin(self.kind, kinds)
        return DuplicatePairs(
            self.first[keep], self.second[keep], self.kind[keep], self.similarity[keep]
        )


@dataclass(frozen=True)
class Twins:
    """The best duplicate of each query; length Q."""

    reference: NDArray[np.int64]  # -1 if there is none
    kind: NDArray[np.int8]  # COPY, MIRRORED or ROTATED; COPY if there is none
    similarity: NDArray[np.float32]  # 0 if there is none

    @property
    def is_upright(self) -> NDArray[np.bool_]:
        """(Q,) whether there is an upright duplicate."""
        return np.asarray((self.reference >= 0) & (self.kind == COPY))

    def completed_by(self, rows: NDArray[np.int64], second: "Twins") -> "Twins":
        """Merge in the results of a second search for the queries ``rows`` (R,).

        They are taken where they add an upright duplicate, or any duplicate if there was none.
        """
        better = second.is_upright & ~self.is_upright[rows]
        better |= (second.reference >= 0) & (self.reference[rows] < 0)

        def merged(mine: NDArray[Any], theirs: NDArray[Any]) -> NDArray[Any]:
            mine = mine.copy()
            mine[rows[better]] = theirs[better]
            return mine

        return Twins(
            merged(self.reference, second.reference),
            merged(self.kind, second.kind),
            merged(self.similarity, second.similarity),
        )


@dataclass(frozen=True)
class _Candidates:
    """Queries that may match a reference once brought into the orientation; length C."""

    query: NDArray[np.int64]
    reference: NDArray[np.int64]
    orientation: NDArray[np.int8]


def near_duplicate_pairs(
    fingerprints: Rows,
    settings: NearDuplicateConfig,
    *,
    not_together: Sequence[str | None] | None = None,
    on_compared: OnCompared | None = None,
) -> DuplicatePairs:
    """All links between near-duplicates.

    Args:
        fingerprints: (N, 9216) uint8; they are read in blocks.
        settings: thresholds for duplicates.
        not_together: N volume ids; slices at different positions of a volume are not copies of
            each other and take up no candidate places. None for slices without a volume.
        on_compared: called with the number of candidates verified so far and their total number.
    """
    firsts, position = distinct_rows(fingerprints)
    distinct = SelectedRows(fingerprints, firsts)
    volumes = None if not_together is None else _codes(not_together)
    distinct_volumes = None if volumes is None else volumes[firsts]
    candidates = _candidates(distinct, distinct, settings, distinct_volumes)
    first, second, kind, similarity = _accepted(
        distinct, distinct, candidates, settings, on_compared
    )
    repeated = np.flatnonzero(firsts[position] != np.arange(len(position)))
    first = np.concatenate([firsts[position[repeated]], firsts[first]])
    second = np.concatenate([repeated, firsts[second]])
    kind = np.concatenate([np.full(len(repeated), COPY, np.int8), kind])
    similarity = np.concatenate([np.ones(len(repeated), np.float32), similarity])
    first, second = np.minimum(first, second), np.maximum(first, second)
    order = np.lexsort((second, first))
    if volumes is not None:  # identical rows were also linked within a volume
        one, other = volumes[first[order]], volumes[second[order]]
        order = order[(one < 0) | (one != other)]
    return DuplicatePairs(first[order], second[order], kind[order], similarity[order])


def _codes(ids: Sequence[str | None]) -> NDArray[np.int64]:
    """An integer for each distinct id (N,); -1 for None."""
    numbers: dict[str | None, int] = {None: -1}
    return np.array([numbers.setdefault(one, len(numbers)) for one in ids], dtype=np.int64)


def find_twins(queries: Rows, references: Rows, settings: NearDuplicateConfig) -> Twins:
    """The most similar near-duplicate of each query among the references.

    Upright copies are preferred to mirrored and rotated ones. Whether a query has a duplicate
    depends neither on the other queries nor on the order of the references.

    Args:
        queries: (Q, 9216) uint8.
        references: (R, 9216) uint8.
        settings: as in `near_duplicate_pairs`, which applies the same criteria.
    """
    firsts, _ = distinct_rows(references)
    distinct = SelectedRows(references, firsts)
    candidates = _candidates(queries, distinct, settings)
    query, found, kind, similarity = _accepted(queries, distinct, candidates, settings)
    twins = Twins(
        reference=np.full(len(queries), -1, np.int64),
        kind=np.full(len(queries), COPY, np.int8),
        similarity=np.zeros(len(queries), np.float32),
    )
    order = np.lexsort((firsts[found], -similarity, kind != COPY, query))
    best_query, start = np.unique(query[order], return_index=True)
    best = order[start]
    twins.reference[best_query] = firsts[found[best]]
    twins.kind[best_query] = kind[best]
    twins.similarity[best_query] = similarity[best]
    return twins


def describe(fingerprints: Rows) -> NDArray[np.float32]:
    """Descriptors (N, 64) of fingerprints (N, 9216): integers as float32, of length about 1000.

    The brightest part of the frame is centred and scaled by its own moments, and the low
    frequencies of its cosine transform are kept. A constant image gives zeros.
    """
    every = np.arange(len(fingerprints))
    blocks = [_describe_block(fingerprints[block]) for block in row_blocks(every, _READ_ROWS)]
    return np.concatenate([np.empty((0, _NUM_FREQUENCIES**2), np.float32), *blocks])


def pair_similarity(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(P,) similarity of upright pairs, as used for verification; 0 for clearly different ones.

    Args:
        first: (P, 9216) uint8.
        second: as ``first``; the result is symmetric.
    """
    rows = np.arange(len(first))
    upright = np.full(len(first), _UPRIGHT, np.int8)
    return _verify(first, second, _Candidates(rows, rows, upright))


def distinct_rows(fingerprints: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index of the first of each distinct fingerprint, and the position of each one in that list.

    The order of the list depends only on the content.
    """
    digests = np.array(
        [
            hashlib.blake2b(row.tobytes(), digest_size=16).digest()
            for block in row_blocks(np.arange(len(fingerprints)), _READ_ROWS)
            for row in fingerprints[block]
        ],
        dtype="V16",
    )
    _, firsts, position = np.unique(digests.view("S16"), return_index=True, return_inverse=True)
    return firsts.astype(np.int64), position.astype(np.int64)


def _describe_block(fingerprints: NDArray[np.uint8]) -> NDArray[np.float32]:
    side, margin = _LAYOUT_SIDE, _LAYOUT_MARGIN
    pictures = torch.from_numpy(
        fingerprints.reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE).astype(np.float32)
    )
    layout = registration.shrink(pictures, side)
    inside = layout[:, margin : side - margin, margin : side - margin]
    ranked = inside.flatten(1).sort(dim=1).values
    dark, bright = (
        ranked[:, int(share * (ranked.shape[1] - 1))][:, None, None] for share in _LAYOUT_QUANTILES
    )
    layout = ((layout - dark) / (bright - dark + 1.0)).clamp(0.0, 1.0)
    inside = layout[:, margin : side - margin, margin : side - margin]
    canonical = (
        _canonical_axis(inside.sum(dim=2)) @ layout @ _canonical_axis(inside.sum(dim=1)).mT
    ).numpy()
    num = _NUM_FREQUENCIES
    spectrum = dctn(canonical, axes=(1, 2), norm="ortho")[:, :num, :num]
    vertical, horizontal = np.indices((num, num))
    radius = np.hypot(vertical, horizontal)
    # The spectrum of images falls with frequency: these weights make all coefficients count.
    weighted = (spectrum * np.where(radius <= num, radius, 0.0)).reshape(len(spectrum), -1)
    length = np.linalg.norm(weighted, axis=1, keepdims=True)
    unit = np.divide(weighted, length, out=np.zeros_like(weighted), where=length > 1e-3)
    return np.rint(unit * _DESCRIPTOR_LENGTH).astype(np.float32)


def _canonical_axis(profile: torch.Tensor) -> torch.Tensor:
    """Resampling (N, 24, 32) of an axis to the centre and spread of its profile (N, 26)."""
    side, margin = _LAYOUT_SIDE, _LAYOUT_MARGIN
    position = torch.arange(margin, side - margin, dtype=torch.float32)
    mass = profile / profile.sum(dim=1, keepdim=True).clamp_min(1e-6)
    centre = (mass * position).sum(dim=1, keepdim=True)
    spread = (mass * (position - centre).square()).sum(dim=1, keepdim=True).sqrt()
    steps = (torch.arange(_CANONICAL_SIDE) + 0.5) / _CANONICAL_SIDE * 2.0 - 1.0
    source = (centre + _LAYOUT_SPREAD * spread * steps).clamp(margin - 0.5, side - margin - 0.5)
    away = (source[:, :, None] - torch.arange(side, dtype=torch.float32)).abs()
    return (1.0 - away).clamp_min(0.0)


def _oriented_descriptors(
    descriptors: NDArray[np.float32], orientation: int
) -> NDArray[np.float32]:
    """Descriptors of the slices in another orientation: `_oriented` in the frequency domain."""
    num = _NUM_FREQUENCIES
    spectrum = descriptors.reshape(-1, num, num)
    odd = np.where(np.arange(num) % 2, np.float32(-1), np.float32(1))
    turns, mirrored = orientation % 4, orientation >= 4
    if mirrored:
        spectrum = spectrum * odd
    for _ in range(turns):
        # A quarter turn is a transposition followed by a flip of the rows.
        spectrum = spectrum.transpose(0, 2, 1) * odd[:, None]
    return np.ascontiguousarray(spectrum.reshape(len(descriptors), -1))


def _oriented(pictures: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Images (P, S, S) in one of the eight orientations of a square.

    They are mirrored left to right for 4 and above, then rotated counter-clockwise by
    ``orientation % 4`` quarter turns.
    """
    if orientation >= 4:
        pictures = pictures[:, :, ::-1]
    return np.rot90(pictures, orientation % 4, axes=(1, 2))


def _candidates(
    queries: Rows,
    references: Rows,
    settings: NearDuplicateConfig,
    volumes: NDArray[np.int64] | None = None,
) -> _Candidates:
    """Pairs with similar descriptors.

    If the queries are the references, each pair is listed once, and pairs of a slice with itself
    or within one of the ``volumes`` (N,) (-1: none) are left out.
    """
    within = queries is references
    query_descriptors = describe(queries)
    reference_descriptors = query_descriptors if within else describe(references)
    if not len(queries) or not len(references):
        none = np.empty(0, np.int64)
        return _Candidates(none, none, none.astype(np.int8))
    index = neighbour_index(reference_descriptors)
    found = []
    for orientation in range(len(_INVERSE)):
        upright = orientation == _UPRIGHT
        wanted = settings.num_candidates if upright else settings.num_turned_candidates
        oriented = _oriented_descriptors(query_descriptors, orientation)
        places = wanted + within  # a slice finds itself within a set
        row, other, cosine = _alike(
            index, oriented, places, settings.descriptor_similarity, volumes
        )
        chosen = row != other if within else np.ones(len(row), np.bool_)
        code = np.full(chosen.sum(), orientation, np.int8)
        found.append((row[chosen], other[chosen], cosine[chosen], code))
    row, other, cosine, code = (np.concatenate(part) for part in zip(*found, strict=True))
    turned = code != _UPRIGHT
    nearly_equal = turned & (cosine >= _NEARLY_EQUAL)
    best = nearly_equal.copy()
    for those, most in (
        (~turned, settings.num_candidates),
        (turned & ~nearly_equal, settings.num_turned_candidates),
    ):
        best[those] = _ranks(row[those], -cosine[those]) < most
    row, other, code = row[best], other[best], code[best]
    if within:
        swap = row > other
        row, other = np.where(swap, other, row), np.where(swap, row, other)
        code = np.where(swap, np.asarray(_INVERSE)[code], code)
    num_slices = max(len(queries), len(references))
    pair, code = np.divmod(
        np.unique((row * num_slices + other) * len(_INVERSE) + code), len(_INVERSE)
    )
    query, reference = np.divmod(pair, num_slices)
    return _Candidates(query, reference, code.astype(np.int8))


def _ranks(group: NDArray[np.int64], value: NDArray[np.float32]) -> NDArray[np.int64]:
    """(n,) place of each value among those of its group, in ascending order, from 0."""
    order = np.lexsort((value, group))
    _, start, count = np.unique(group[order], return_index=True, return_counts=True)
    ranks = np.empty(len(group), np.int64)
    ranks[order] = np.arange(len(group)) - np.repeat(start, count)
    return ranks


def _alike(
    index: faiss.Index,
    descriptors: NDArray[np.float32],
    wanted: int,
    least: float,
    volumes: NDArray[np.int64] | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """At most ``wanted`` nearest rows of each descriptor in the index, all of other volumes.

    Returns:
        Row of the descriptor, row of its neighbour, and their cosine, which is at least ``least``.
    """
    places = wanted
    if volumes is not None and (volumes >= 0).any():
        largest = np.bincount(volumes[volumes >= 0]).max()
        places += min(int(largest), _MAX_OF_ONE_VOLUME)
    places = min(places, index.ntotal)
    rows, others, similarities = [], [], []
    for start in range(0, len(descriptors), _QUERIES_AT_ONCE):
        product, neighbour = index.search(descriptors[start : start + _QUERIES_AT_ONCE], places)
        cosine = product / np.float32(_DESCRIPTOR_LENGTH**2)
        alike = (cosine >= least) & (neighbour >= 0)
        if volumes is not None:
            own = volumes[start : start + len(neighbour), None]
            alike &= (own < 0) | (volumes[neighbour] != own)
            alike &= alike.cumsum(axis=1) <= wanted
        row, column = np.nonzero(alike)
        rows.append(row + start)
        others.append(neighbour[row, column])
        similarities.append(cosine[row, column])
    return np.concatenate(rows), np.concatenate(others), np.concatenate(similarities)


def _accepted(
    queries: Rows,
    references: Rows,
    candidates: _Candidates,
    settings: NearDuplicateConfig,
    on_compared: OnCompared | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int8], NDArray[np.float32]]:
    """Query, reference, kind and similarity of the pairs confirmed by their pixels."""
    similarity = _verify(queries, references, candidates, on_compared)
    upright = candidates.orientation == _UPRIGHT
    accepted = similarity >= np.where(upright, settings.similarity, settings.turned_similarity)
    chosen = np.flatnonzero(accepted)
    # One link per pair: upright if accepted, otherwise the most similar orientation.
    order = chosen[
        np.lexsort(
            (
                -similarity[chosen],
                ~upright[chosen],
                candidates.reference[chosen],
                candidates.query[chosen],
            )
        )
    ]
    pair = np.stack([candidates.query[order], candidates.reference[order]], axis=1)
    _, start = np.unique(pair, axis=0, return_index=True)
    best = order[start]
    kind = np.asarray(_KIND_OF, np.int8)[candidates.orientation[best]]
    return candidates.query[best], candidates.reference[best], kind, similarity[best]


def _verify(
    queries: Rows,
    references: Rows,
    candidates: _Candidates,
    on_compared: OnCompared | None = None,
) -> NDArray[np.float32]:
    """(C,) similarity of candidates; 0 for those ruled out at a coarse level."""
    num_pairs = len(candidates.query)
    similarity = np.empty(num_pairs, np.float32)

    def verify_block(start: int) -> NDArray[np.float32]:
        block = slice(start, start + _VERIFIED_PAIRS)
        fixed, moving = _facing(
            queries[candidates.query[block]],
            references[candidates.reference[block]],
            candidates.orientation[block],
        )
        return registration.similarity(fixed, moving).numpy()

    # Images are too small for multi-threaded operations: each thread processes its own blocks.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads) as threads:
            num_done = 0
            for block in threads.map(verify_block, range(0, num_pairs, _VERIFIED_PAIRS)):
                similarity[num_done : num_done + len(block)] = block
                num_done += len(block)
                if on_compared is not None:
                    on_compared(num_done, num_pairs)
    finally:
        torch.set_num_threads(num_threads)
    return similarity


def _facing(
    queries: NDArray[np.uint8], references: NDArray[np.uint8], orientations: NDArray[np.int8]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs in the same orientation, (P, 96, 96) float32 each.

    Which of the two is turned and fixed depends on their content, not on which one is the query, so
    that decisions are symmetric.
    """
    swap = np.array(
        [one.tobytes() > other.tobytes() for one, other in zip(queries, references, strict=True)]
    )
    still = np.where(swap[:, None], references, queries)
    moving = np.where(swap[:, None], queries, references)
    orientations = np.where(swap, np.asarray(_INVERSE)[orientations], orientations)
    shape = (-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    still, moving = still.reshape(shape), moving.reshape(shape)
    fixed = still.copy()
    for orientation in range(len(_INVERSE)):
        chosen = orientations == orientation
        fixed[chosen] = _oriented(still[chosen], orientation)
    return torch.from_numpy(fixed).float(), torch.from_numpy(moving).float()
