"""Which slices are likely of one subject, judged by looks where no metadata tells.

Neighbouring slices of one series lie in the same frame and repeat the same bone, scalp and folds.
What they share shows in the fine structure of a 64 x 64 picture, a band of spatial frequencies;
its coarse shading is shared with every head in that plane. Thumbnails are deliberately not aligned:
where a head lies in its frame is a mark of its series, and alignment makes strangers more alike
than it makes neighbours. Flips are seen through, since public sets mix slices with mirror images.

The estimate is per subject **and plane** (and mostly per contrast): an axial and a sagittal slice
of one head have no looks in common, so that groups are parts of subjects. It errs both ways: a
false link merges strangers of like anatomy, most often in slices near the vertex, which have little
structure; a missed link leaves two slices of a subject in different groups, the likelier the
further apart they lie. ``python jobs/benchmark.py subjects`` measures both where the truth is
known. Where subjects or series are named, the names are used instead.

The search is exact: time grows with N^2, memory with N x 16 kB.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from brainray.config import SubjectConfig

COMPARED_SIDE = 64  # pixels: finer structure is noise between neighbouring slices
SUBJECT_PREFIX = "estimated-"
"""Marks a subject id as estimated."""

_FINE_SIGMA, _COARSE_SIGMA = 0.5, 2.0  # of the band that is compared, in thumbnail pixels
_MIN_LENGTH = 1e-3  # of a descriptor before scaling: below it lies rounding, no structure
_BLOCK_ROWS = 256

# A flip negates the odd parts of an image along its axis. Rows: as is, left-right, upside down,
# both; columns: the parts of `anatomy_descriptors`. Of two flips, one after the other is the one
# whose number is the exclusive or of theirs.
_FLIP_SIGNS = np.array(
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=np.float32
)

Descriptors = NDArray[np.float32]  # (N, 4, 1024), see `anatomy_descriptors`


@dataclass(frozen=True)
class Links:
    """Pairs of slices, most similar first."""

    first: NDArray[np.int64]  # (L,)
    second: NDArray[np.int64]  # (L,), above `first`
    flip: NDArray[np.int64]  # (L,), which flip of the one looks like the other: 0 none
    similarity: NDArray[np.float32]  # (L,)


def estimate_subjects(
    thumbnails: NDArray[np.uint8],
    sample_ids: Sequence[str],
    duplicate_group_ids: Sequence[str],
    settings: SubjectConfig,
) -> list[str]:
    """Estimated subject id of each slice, whatever the order of the slices.

    Copies are of one subject by definition: each group of them enters by its slice of the smallest
    id. Slices that show the same, flipped or in another contrast, come next, and enter as one view.
    Mutual nearest views are linked, and links merge groups from the most similar pair downwards, as
    long as the merged group stays small enough and its two parts alike on average.

    Args:
        thumbnails: (N, S * S) uint8, whole frames area-averaged to S x S, row-major.
        sample_ids: N ids.
        duplicate_group_ids: N ids of groups of copies.
        settings: what is accepted.

    Returns:
        N ids: the smallest sample_id of the group behind `SUBJECT_PREFIX`.
    """
    smallest: dict[str, tuple[str, int]] = {}
    for index, (copies, identity) in enumerate(zip(duplicate_group_ids, sample_ids, strict=True)):
        smallest[copies] = min((identity, index), smallest.get(copies, (identity, index)))
    # In the order of ids, so that neither rounding nor ties depend on the order of the input.
    nodes = sorted((identity, copies, index) for copies, (identity, index) in smallest.items())
    descriptors = anatomy_descriptors(thumbnails[[index for _, _, index in nodes]])
    view = same_view_groups(descriptors, min_similarity=settings.same_view_similarity)
    views, view_of_node = np.unique(view, return_inverse=True)
    distinct = descriptors[views]
    group_of_view = merge_links(distinct, mutual_links(distinct, settings), settings)
    first_node = views[group_of_view[view_of_node]].tolist()
    subject = {
        copies: SUBJECT_PREFIX + nodes[first][0]
        for (_, copies, _), first in zip(nodes, first_node, strict=True)
    }
    return [subject[copies] for copies in duplicate_group_ids]


@dataclass(frozen=True)
class Mates:
    """For each of Q queries the most similar slice that is likely of its subject."""

    reference: NDArray[np.int64]  # (Q,) -1 where there is none
    similarity: NDArray[np.float32]  # (Q,) of the most similar slice, accepted or not


def find_same_subject(
    queries: NDArray[np.uint8], references: NDArray[np.uint8], settings: SubjectConfig
) -> Mates:
    """The reference slice most likely of the query's subject, by similarity alone.

    The more references, the likelier one of them resembles a stranger: on a large set this rather
    calls a stranger known than a known subject strange.

    Args:
        queries: (Q, S * S) uint8 thumbnails, as in `estimate_subjects`.
        references: (R, S * S) uint8; of none, no query is known.
        settings: of these, `min_lone_similarity` decides.
    """
    reference = [np.empty(0, np.int64)]
    similarity = [np.empty(0, np.float32)]
    if len(references) == 0:
        return Mates(np.full(len(queries), -1, np.int64), np.zeros(len(queries), np.float32))
    described = anatomy_descriptors(references)
    for _, by_flip in _similarity_blocks(anatomy_descriptors(queries), described):
        best = by_flip.max(axis=0)
        nearest = best.argmax(axis=1)
        similarity.append(np.take_along_axis(best, nearest[:, None], axis=1)[:, 0])
        reference.append(
            np.where(similarity[-1] >= settings.min_lone_similarity, nearest, -1).astype(np.int64)
        )
    return Mates(np.concatenate(reference), np.concatenate(similarity))


def anatomy_descriptors(thumbnails: NDArray[np.uint8]) -> Descriptors:
    """Fine structure of thumbnails (N, S * S) uint8, whatever their gain; blank ones become 0.

    Square roots keep bright scalp and lesions from outweighing the brain; the difference of two
    Gaussians leaves out noise below and shading above the band. Each image is split by an
    orthogonal change of basis into its parts (N, 4, 1024) that are even or odd from left to right
    and from top to bottom, so that summed products of parts are the similarity of two slices, and
    with some signs changed that of their flips, at no further cost.
    """
    side = math.isqrt(thumbnails.shape[1])
    compared = (COMPARED_SIDE, COMPARED_SIDE)
    bands = np.empty((len(thumbnails), COMPARED_SIDE**2), np.float32)
    for band, thumbnail in zip(bands, thumbnails, strict=True):
        small = cv2.resize(thumbnail.reshape(side, side), compared, interpolation=cv2.INTER_AREA)
        image = np.sqrt(small, dtype=np.float32)
        fine = cv2.GaussianBlur(image, (0, 0), _FINE_SIGMA)
        band[:] = (fine - cv2.GaussianBlur(image, (0, 0), _COARSE_SIGMA)).ravel()
    bands -= bands.mean(axis=1, keepdims=True)
    length = np.linalg.norm(bands, axis=1, keepdims=True)
    np.divide(bands, length, out=bands, where=length > _MIN_LENGTH)
    images = bands.reshape(-1, COMPARED_SIDE, COMPARED_SIDE)
    half = COMPARED_SIDE // 2
    left, right = images[:, :, :half], images[:, :, : half - 1 : -1]
    parts = np.stack([left + right, left - right], axis=1)
    top, bottom = parts[:, :, :half], parts[:, :, : half - 1 : -1]
    by_part = np.concatenate([top + bottom, top - bottom], axis=1)
    return by_part.reshape(len(images), 4, half * half) * np.float32(0.5)


def same_view_groups(descriptors: Descriptors, *, min_similarity: float) -> NDArray[np.int64]:
    """Smallest index (N,) of the slices that show what this one shows, flipped or as it is."""
    rows, columns = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start, similarity in _similarity_blocks(descriptors, descriptors):
        row, column = np.nonzero((similarity >= min_similarity).any(axis=0))
        rows.append(row + start)
        columns.append(column)
    row, column = np.concatenate(rows), np.concatenate(columns)
    graph = coo_array((np.ones(len(row), np.int8), (row, column)), shape=(len(descriptors),) * 2)
    _, component = connected_components(graph, directed=False)
    _, earliest, group = np.unique(component, return_index=True, return_inverse=True)
    return np.asarray(earliest[group], dtype=np.int64)


def mutual_links(descriptors: Descriptors, settings: SubjectConfig) -> Links:
    """Pairs of slices that are similar enough and each among the nearest of the other."""
    num_slices = len(descriptors)
    num_neighbours = min(settings.num_neighbours, num_slices - 1)
    if num_neighbours < 1:
        nothing = np.empty(0, np.int64)
        return Links(nothing, nothing, nothing, np.empty(0, np.float32))
    found = []
    for start, by_flip in _similarity_blocks(descriptors, descriptors):
        similarity = by_flip.max(axis=0)
        own = np.arange(len(similarity))
        similarity[own, own + start] = -np.inf
        last = num_slices - num_neighbours
        nearest = np.argpartition(similarity, last, axis=1)[:, last:]
        value = np.take_along_axis(similarity, nearest, axis=1)
        row, place = np.nonzero(value >= settings.min_similarity)
        column = nearest[row, place]
        flip = by_flip[:, row, column].argmax(axis=0)
        found.append((row + start, column, flip, value[row, place]))
    row, column, flip, value = (np.concatenate(parts) for parts in zip(*found, strict=True))
    is_mutual = np.isin(row * num_slices + column, column * num_slices + row)
    kept = np.flatnonzero((row < column) & is_mutual)
    order = kept[np.lexsort((column[kept], row[kept], -value[kept]))]
    return Links(row[order], column[order], flip[order], value[order])


def merge_links(
    descriptors: Descriptors, links: Links, settings: SubjectConfig
) -> NDArray[np.int64]:
    """Smallest index (N,) in each slice's group: Kruskal's order, with two conditions on a merge.

    Every slice carries the flip that brings it into the frame of its group's first one, so that
    slices are compared across the group in one frame.
    """
    group = list(range(len(descriptors)))
    flip_in_group = [0] * len(descriptors)
    members = [[index] for index in group]
    # Of unit rows: the product of two sums is the sum over all pairs of slices.
    sums = list(descriptors)
    for first, second, flip in zip(
        links.first.tolist(), links.second.tolist(), links.flip.tolist(), strict=True
    ):
        kept, absorbed = sorted((group[first], group[second]))
        turn = flip_in_group[first] ^ flip ^ flip_in_group[second]
        turned = sums[absorbed] * _FLIP_SIGNS[turn][:, None]
        num_pairs = len(members[kept]) * len(members[absorbed])
        if (
            kept == absorbed
            or len(members[kept]) + len(members[absorbed]) > settings.max_slices
            or np.vdot(sums[kept], turned) < settings.min_group_similarity * num_pairs
        ):
            continue
        for index in members[absorbed]:
            group[index] = kept
            flip_in_group[index] ^= turn
        members[kept] += members[absorbed]
        members[absorbed] = []
        sums[kept] = sums[kept] + turned
    return np.array(group, dtype=np.int64)


def _similarity_blocks(
    queries: Descriptors, references: Descriptors
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first query row, similarities (4, B, R) of a block with all references, per flip)."""
    references_by_part = references.transpose(1, 2, 0)  # (4, 1024, R)
    for start in range(0, len(queries), _BLOCK_ROWS):
        block = queries[start : start + _BLOCK_ROWS].transpose(1, 0, 2)  # (4, B, 1024)
        yield start, np.tensordot(_FLIP_SIGNS, block @ references_by_part, axes=1)
