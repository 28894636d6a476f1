"""Estimates which slices are of one subject, by image similarity, if metadata is missing.

Neighbouring slices of one series lie in the same frame and show the same bone, scalp and folds.
These show in the local contrast of a 32 x 32 image; the coarse shading is common to all heads in
that plane, and how bright a tissue is depends on the contrast. Thumbnails are deliberately not
aligned: the position of a head in its frame is characteristic of its series, and alignment raises
the similarity of different subjects more than that of neighbours. Flipped slices are matched too,
since public datasets contain mirror images.

The estimate is per subject **and plane** (and often per contrast): an axial and a sagittal slice
of one head do not look alike, so groups are parts of subjects. There are errors of both kinds. A
false link merges subjects of similar anatomy, most often in slices near the vertex, which have
little structure. A missed link leaves two slices of a subject in different groups, more likely the
further apart they are. ``python jobs/benchmark.py subjects`` measures both on data with known
subjects. If subjects or series are named, the names are used instead.

Up to 8,192 slices are compared exhaustively. Above that, each slice is compared with its nearest
neighbours in an index of a few principal components, and descriptors (4 kB per slice) are kept in
a file; time then grows little faster than N.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.config import SubjectConfig
from brainray.mri.groups import first_connected
from brainray.mri.neighbours import neighbour_index
from brainray.mri.row_file import RowFile, Rows, row_blocks
from brainray.mri.skull_strip import without_frame

COMPARED_SIDE = 32  # pixels: between neighbouring slices, finer structure is noise
SUBJECT_PREFIX = "estimated-"
"""Marks a subject id as estimated."""

VERSION = 2
"""Changes when the same slices are grouped otherwise."""

_FINE_SIGMA, _COARSE_SIGMA = 0.5, 2.0  # of the band that is compared, in compared pixels
_CONTRAST_FLOOR = 0.2  # of the whole slice's contrast: below it, local contrast is mostly noise
_EPSILON = 1e-3  # below it, there is only rounding error
_BLOCK_ROWS = 256

EXHAUSTIVE_ROWS = 8192
"""Up to this many slices, all pairs are compared."""
_CANDIDATES = 16  # per slice
_CANDIDATE_BLOCK_ROWS = 128  # queries whose candidates' descriptors are in memory at once, 8 MB
_COMPONENTS_PER_PART = 32
_PCA_ROWS = 4096

# A flip negates the odd parts of an image along its axis. Rows: none, left-right, upside down,
# both; columns: the parts of `anatomy_descriptors`. The composition of two flips is the flip whose
# number is the exclusive or of theirs.
_FLIP_SIGNS = np.array(
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=np.float32
)

_NUM_PARTS, _PART_SIZE = 4, (COMPARED_SIDE // 2) ** 2

Descriptors = NDArray[np.float32]  # (N, 4, 256), see `anatomy_descriptors`
_NO_DESCRIPTORS = np.empty((0, _NUM_PARTS, _PART_SIZE), np.float32)


@dataclass(frozen=True)
class Links:
    """Pairs of similar slices, most similar first."""

    first: NDArray[np.int64]  # (L,)
    second: NDArray[np.int64]  # (L,), greater than `first`
    flip: NDArray[np.int64]  # (L,), the flip of one that matches the other: 0 none
    similarity: NDArray[np.float32]  # (L,)


def estimate_subjects(
    thumbnails: Rows,
    sample_ids: Sequence[str],
    duplicate_group_ids: Sequence[str],
    settings: SubjectConfig,
) -> list[str]:
    """Estimated subject id of each slice, independent of the order of the slices.

    Copies are of one subject by definition: each group of copies is represented by the slice with
    the smallest id. Slices of the same view, flipped or in another contrast, are then merged.
    Mutual nearest views are linked. Links merge groups, starting with the most similar pair, as
    long as the merged group is small enough and its two parts are similar enough on average.

    Args:
        thumbnails: (N, S * S) uint8, complete frames area-averaged to S x S, row-major.
        sample_ids: N ids.
        duplicate_group_ids: N ids of groups of copies.
        settings: thresholds.

    Returns:
        N ids: `SUBJECT_PREFIX` and the smallest sample_id of the group.
    """
    smallest: dict[str, tuple[str, int]] = {}
    for index, (copies, identity) in enumerate(zip(duplicate_group_ids, sample_ids, strict=True)):
        smallest[copies] = min((identity, index), smallest.get(copies, (identity, index)))
    # Sorted by id: neither rounding nor ties then depend on the order of the input.
    nodes = sorted((identity, copies, index) for copies, (identity, index) in smallest.items())
    described = Described.of(thumbnails, np.array([index for _, _, index in nodes], np.int64))
    view = same_view_groups(described, min_similarity=settings.same_view_similarity)
    views, view_of_node = np.unique(view, return_inverse=True)
    distinct = described.only(views)
    group_of_view = merge_links(distinct, mutual_links(distinct, settings), settings)
    first_node = views[group_of_view[view_of_node]].tolist()
    subject = {
        copies: SUBJECT_PREFIX + nodes[first][0]
        for (_, copies, _), first in zip(nodes, first_node, strict=True)
    }
    return [subject[copies] for copies in duplicate_group_ids]


@dataclass(frozen=True)
class Mates:
    """For each of Q queries, the most similar slice that is likely of the same subject."""

    reference: NDArray[np.int64]  # (Q,) -1 if there is none
    similarity: NDArray[np.float32]  # (Q,) of the most similar slice, accepted or not


def find_same_subject(queries: Rows, references: Rows, min_similarity: float) -> Mates:
    """The reference slice most likely of the query's subject, by similarity alone.

    With more references, a match with a different subject becomes more likely: on a large set, it
    errs towards false matches.

    Args:
        queries: (Q, S * S) uint8 thumbnails, as in `estimate_subjects`.
        references: (R, S * S) uint8; if empty, no query is matched.
        min_similarity: of a match.
    """
    reference = [np.empty(0, np.int64)]
    similarity = [np.empty(0, np.float32)]
    if len(references) == 0:
        return Mates(np.full(len(queries), -1, np.int64), np.zeros(len(queries), np.float32))
    described = Described.of(references)
    for _, found, by_flip in _compared(Described.of(queries), described):
        best = by_flip.max(axis=0)
        place = best.argmax(axis=1)[:, None]
        nearest = np.take_along_axis(found, place, axis=1)[:, 0]
        similarity.append(np.take_along_axis(best, place, axis=1)[:, 0])
        reference.append(np.where(similarity[-1] >= min_similarity, nearest, -1))
    return Mates(np.concatenate(reference), np.concatenate(similarity))


def anatomy_descriptors(thumbnails: NDArray[np.uint8]) -> Descriptors:
    """Local contrast of thumbnails (N, S * S) uint8, independent of gain; 0 for blank ones.

    A white frame, whose edge would be the strongest in every slice that has one, is left out.
    The difference of two Gaussians removes finer noise and coarser shading. Divided by its local
    standard deviation (local contrast normalisation, Jarrett et al. 2009), faint folds count as
    much as bright scalp and lesions, in any contrast. An orthogonal change of basis splits each
    image into parts (N, 4, 256) that are even or odd from left to right and from top to bottom.
    The sum of the products of parts is the similarity of two slices; with some signs changed, it is
    the similarity of their flips, at no extra cost.
    """
    side = math.isqrt(thumbnails.shape[1])
    compared = (COMPARED_SIDE, COMPARED_SIDE)
    bands = np.zeros((len(thumbnails), COMPARED_SIDE**2), np.float32)
    for band, thumbnail in zip(bands, thumbnails, strict=True):
        picture = without_frame(thumbnail.reshape(side, side))
        small = cv2.resize(picture, compared, interpolation=cv2.INTER_AREA)
        image = np.sqrt(small, dtype=np.float32)
        fine = cv2.GaussianBlur(image, (0, 0), _FINE_SIGMA)
        detail = fine - cv2.GaussianBlur(image, (0, 0), _COARSE_SIGMA)
        contrast = np.sqrt(cv2.GaussianBlur(np.square(detail), (0, 0), _COARSE_SIGMA))
        overall = detail.std()
        if overall > _EPSILON:
            band[:] = (detail / (contrast + _CONTRAST_FLOOR * overall)).ravel()
    bands -= bands.mean(axis=1, keepdims=True)
    length = np.linalg.norm(bands, axis=1, keepdims=True)
    np.divide(bands, length, out=bands, where=length > _EPSILON)
    images = bands.reshape(-1, COMPARED_SIDE, COMPARED_SIDE)
    half = COMPARED_SIDE // 2
    left, right = images[:, :, :half], images[:, :, : half - 1 : -1]
    parts = np.stack([left + right, left - right], axis=1)
    top, bottom = parts[:, :, :half], parts[:, :, : half - 1 : -1]
    by_part = np.concatenate([top + bottom, top - bottom], axis=1)
    return by_part.reshape(len(images), 4, half * half) * np.float32(0.5)


class Described:
    """Descriptors of N slices, in memory or, if there are many, in a file."""

    def __init__(self, num_rows: int, blocks: Iterable[Descriptors]) -> None:
        """``blocks``: all rows, in blocks."""
        self._rows: NDArray[np.float32] | RowFile
        if num_rows <= EXHAUSTIVE_ROWS:
            self._rows = np.concatenate([_NO_DESCRIPTORS, *blocks]).reshape(
                num_rows, _NUM_PARTS * _PART_SIZE
            )
            return
        self._rows = RowFile(_NUM_PARTS * _PART_SIZE, np.float32)
        for block in blocks:
            self._rows.append(block.reshape(len(block), -1))

    @classmethod
    def of(cls, thumbnails: Rows, rows: NDArray[np.int64] | None = None) -> "Described":
        """Describe these ``rows`` of thumbnails (., S * S), or all."""
        wanted = np.arange(len(thumbnails)) if rows is None else rows
        blocks = (
            anatomy_descriptors(thumbnails[block]) for block in row_blocks(wanted, _BLOCK_ROWS)
        )
        return cls(len(wanted), blocks)

    def only(self, rows: NDArray[np.int64]) -> "Described":
        """The descriptors of these rows (n,)."""
        return Described(len(rows), (self[block] for block in row_blocks(rows, _BLOCK_ROWS)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: NDArray[np.int64]) -> Descriptors:
        return self._rows[rows].reshape(len(rows), _NUM_PARTS, _PART_SIZE)

    def __setitem__(self, row: int, descriptor: NDArray[np.float32]) -> None:
        self._rows[row] = descriptor.reshape(-1)


def same_view_groups(described: Described, *, min_similarity: float) -> NDArray[np.int64]:
    """Smallest index (N,) among the slices with the same view as each slice, flipped or not."""
    rows, columns = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start, found, by_flip in _compared(described, described):
        row, place = np.nonzero((by_flip >= min_similarity).any(axis=0))
        rows.append(row + start)
        columns.append(found[row, place])
    return first_connected(len(described), np.concatenate(rows), np.concatenate(columns))


def mutual_links(described: Described, settings: SubjectConfig) -> Links:
    """Pairs of slices that are similar enough and among each other's nearest."""
    num_slices = len(described)
    num_neighbours = min(settings.num_neighbours, num_slices - 1)
    if num_neighbours < 1:
        no_rows = np.empty(0, np.int64)
        return Links(no_rows, no_rows, no_rows, np.empty(0, np.float32))
    links = []
    for start, found, by_flip in _compared(described, described):
        similarity = by_flip.max(axis=0)
        similarity[found == np.arange(start, start + len(found))[:, None]] = -np.inf
        last = max(found.shape[1] - num_neighbours, 0)
        nearest = np.argpartition(similarity, last, axis=1)[:, last:]
        value = np.take_along_axis(similarity, nearest, axis=1)
        row, place = np.nonzero(value >= settings.link_similarity)
        flip = by_flip[:, row, nearest[row, place]].argmax(axis=0)
        links.append((row + start, found[row, nearest[row, place]], flip, value[row, place]))
    row, column, flip, value = (np.concatenate(parts) for parts in zip(*links, strict=True))
    is_mutual = np.isin(row * num_slices + column, column * num_slices + row)
    kept = np.flatnonzero((row < column) & is_mutual)
    order = kept[np.lexsort((column[kept], row[kept], -value[kept]))]
    return Links(row[order], column[order], flip[order], value[order])


def merge_links(described: Described, links: Links, settings: SubjectConfig) -> NDArray[np.int64]:
    """Smallest index (N,) in each slice's group: Kruskal's order, with two conditions on a merge.

    Each slice has a flip that maps it to the frame of the first slice in its group, so that all
    slices of a group are compared in one frame. The descriptors are overwritten: a group's sum
    replaces the descriptor of its first slice.
    """
    group = list(range(len(described)))
    flip_in_group = [0] * len(described)
    members = [[index] for index in group]
    for first, second, flip in zip(
        links.first.tolist(), links.second.tolist(), links.flip.tolist(), strict=True
    ):
        kept, absorbed = sorted((group[first], group[second]))
        if kept == absorbed or len(members[kept]) + len(members[absorbed]) > settings.max_slices:
            continue
        turn = flip_in_group[first] ^ flip ^ flip_in_group[second]
        # Rows have unit length: the product of two sums is the sum over all pairs of slices.
        sums, others = described[np.array([kept, absorbed])]
        turned = others * _FLIP_SIGNS[turn][:, None]
        num_pairs = len(members[kept]) * len(members[absorbed])
        if np.vdot(sums, turned) < settings.group_similarity * num_pairs:
            continue
        for index in members[absorbed]:
            group[index] = kept
            flip_in_group[index] ^= turn
        members[kept] += members[absorbed]
        members[absorbed] = []
        described[kept] = sums + turned
    return np.array(group, dtype=np.int64)


def _compared(
    queries: Described, references: Described
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:
    """Blocks of queries with the references that they were compared with.

    For B queries: the row of the first, the references' rows (B, M), and similarities (4, B, M) by
    flip. If there are few references, all are compared.
    """
    if len(references) > EXHAUSTIVE_ROWS:
        yield from _compared_with_candidates(queries, references)
        return
    every = np.arange(len(references))
    by_part = references[every].transpose(1, 2, 0)  # (4, 256, R)
    for rows in row_blocks(np.arange(len(queries)), _BLOCK_ROWS):
        block = queries[rows].transpose(1, 0, 2)  # (4, B, 256)
        by_flip = np.tensordot(_FLIP_SIGNS, block @ by_part, axes=1)
        yield int(rows[0]), np.broadcast_to(every, by_flip.shape[1:]), by_flip


def _compared_with_candidates(
    queries: Described, references: Described
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:
    """As `_compared`, with the nearest references in a few principal components."""
    step = max(1, len(references) // _PCA_ROWS)
    components = _principal_components(references[np.arange(0, len(references), step)])
    reduced = _reduced(references, components)
    index = neighbour_index(reduced)
    for rows in row_blocks(np.arange(len(queries)), _CANDIDATE_BLOCK_ROWS):
        block = queries[rows]
        flipped = _project(block, components)[None] * _FLIP_SIGNS[:, None, :, None]
        likely, found = index.search(flipped.reshape(-1, reduced.shape[1]), _CANDIDATES)
        by_slice = (len(_FLIP_SIGNS), len(rows), -1)
        candidates = _likeliest(
            np.concatenate(likely.reshape(by_slice), axis=1),
            np.concatenate(found.reshape(by_slice), axis=1),
            _CANDIDATES,
        )
        used, place = np.unique(candidates, return_inverse=True)
        others = references[np.maximum(used, 0)][place.reshape(candidates.shape)]  # (B, M, 4, 256)
        by_part = np.einsum("bpd,bmpd->pbm", block, others, optimize=True)
        by_flip = np.tensordot(_FLIP_SIGNS, by_part, axes=1)
        by_flip[:, candidates < 0] = -np.inf
        yield int(rows[0]), candidates, by_flip


def _likeliest(
    similarity: NDArray[np.float32], found: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """(B, count) most similar of the rows found (B, M), each once; -1 if there are fewer."""
    order = np.lexsort((-similarity, found), axis=1)
    found = np.take_along_axis(found, order, axis=1)
    similarity = np.take_along_axis(similarity, order, axis=1)
    is_repeat = found[:, 1:] == found[:, :-1]
    similarity[:, 1:][is_repeat] = -np.inf
    found[:, 1:][is_repeat] = -1
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(found, best, axis=1)


def _principal_components(sample: Descriptors) -> NDArray[np.float32]:
    """(4, 256, 32): for each part, the directions in which the sample varies most."""
    return np.stack(
        [
            np.linalg.eigh(part.T @ part)[1][:, -_COMPONENTS_PER_PART:]
            for part in sample.transpose(1, 0, 2)
        ]
    )


def _project(descriptors: Descriptors, components: NDArray[np.float32]) -> NDArray[np.float32]:
    """Components (N, 4, 32), of unit length."""
    reduced = np.einsum("npd,pdk->npk", descriptors, components, optimize=True)
    length = np.linalg.norm(reduced, axis=(1, 2), keepdims=True)
    return np.asarray(reduced / np.maximum(length, _EPSILON), np.float32)


def _reduced(described: Described, components: NDArray[np.float32]) -> NDArray[np.float32]:
    """Components (N, 128) float32 of all slices."""
    every = np.arange(len(described))
    blocks = [_project(described[rows], components) for rows in row_blocks(every, _BLOCK_ROWS)]
    return np.concatenate(blocks).reshape(len(described), -1)
