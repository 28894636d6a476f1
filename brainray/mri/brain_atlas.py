"""Where the brain likely is in a slice, by slices of other heads whose brain is known.

Multi-atlas segmentation (Iglesias and Sabuncu, "Multi-atlas segmentation of biomedical images: a
survey", 2015): each of some 200 atlas slices is laid over the head by the shift, scale, stretch and
turn of most mutual information (Viola and Wells, "Alignment by maximization of mutual information",
1997); the brains of those that fit best are averaged. An atlas slice knows six kinds of cells
(air; dark, medium and bright outside of the brain; dark and bright within it), and mutual
information asks only that a kind looks alike all over a slice, not how: no contrast is assumed.

``brain_atlas.npz`` was made by this module's command of three heads, whose brains MindGrab
(Fani et al. 2025) had outlined: OpenNeuro's ds000031 (sub-01, ses-006; CC0), pydeface's mean head
(MIT) and the ICBM 152 nonlinear template of 2009 (copyright (C) 1993-2009 Louis Collins, McConnell
Brain Imaging Centre, Montreal Neurological Institute, McGill University, whose permission to
copy, modify and distribute it holds where this notice appears).

    python -m brainray.mri.brain_atlas --out FILE.npz DIR

DIR holds volumes, NAME.nii.gz, and masks of their brains, NAME_mask.nii.gz.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.errors import BrainrayError, DataError
from brainray.mri.head import Head, Plane, find_head, sample
from brainray.mri.reference_heads import ReferenceSlice, find_heads, reference_slices

_FILE = Path(__file__).with_suffix(".npz")

GRID = 32  # cells a side of the square on which slices are compared
_REACH = 1.5  # of the square from the head's centre, in radii of its inscribed circle
_CELL = 2.0 * _REACH / GRID
_BLUR = 0.35  # cells
_AXIS = (np.arange(GRID, dtype=np.float32) + 0.5) * _CELL - _REACH
_COLUMNS, _ROWS = np.meshgrid(_AXIS, _AXIS)

# Kinds of cells: 0 is air, then three outside of the brain and two within it, by grey value.
_OUTSIDE_QUANTILES = (1 / 3, 2 / 3)
_INSIDE_QUANTILES = (0.35,)
_FIRST_INSIDE = 4
_NUM_KINDS = 6
_NUM_GREYS = 16  # of the slice in question, by quantiles
_NUM_BINS = _NUM_GREYS + 1  # 0 is air

# A pose is (scale, x, y, stretch, turn): lengths in radii, the turn in radians.
_SCALES = (0.9, 1.0, 1.12)
_FIRST_POSES = np.array(
    [
        *((*pose, 1.0, 0.0) for pose in product(_SCALES, (-0.1, 0.0, 0.1), (-0.12, 0.0, 0.12))),
        *((scale, 0.0, 0.0, stretch, 0.0) for scale, stretch in product(_SCALES, (0.85, 1.18))),
    ],
    np.float32,
)
_FIRST_STRIDE = 2  # every second cell tells which atlas slices are worth a closer look
_NUM_REFINED = 24
_STEPS = np.array([0.05, 0.05, 0.05, 0.05, 0.07], np.float32)  # of each part of a pose
_IS_FACTOR = np.array([True, False, False, True, False])
_STEP_SIZES = (1.0, 1.0, 0.6, 0.4, 0.25)
_PRIOR_WIDTHS = np.array([0.15, 0.15, 0.15, 0.08, 0.15], np.float32)
_PRIOR = 0.005  # nats for a part of the pose that lies one such width off
_NUM_FUSED = 16
_TEMPERATURE = 0.025  # nats

# Making an atlas.
_NUM_SLICES = 200
_SPACING = 6  # slices
_CUT = 0.3  # of coronal and sagittal slices, as clinical scans often lack the neck and more
_MIN_BRAIN = 0.02  # of the largest brain in the plane
_LABEL_WEIGHT = 0.7

Poses = NDArray[np.float32]  # (P, 5)


@dataclass(frozen=True)
class BrainAtlas:
    """N slices of heads, each on the square about its own head's centre."""

    kinds: NDArray[np.uint8]
    """(N, GRID, GRID) kind of each cell."""
    brains: Plane
    """(N, GRID, GRID) share of the cell that is brain."""

    @classmethod
    def read(cls, path: Path = _FILE) -> "BrainAtlas":
        """With the mirror images of slices that face a side."""
        with np.load(path) as stored:
            kinds, sides = stored["kinds"], stored["faces_side"]
            brains = stored["brains"].astype(np.float32) / 255.0
        mirrored = kinds[sides, :, ::-1], brains[sides, :, ::-1]
        return cls(
            np.concatenate([kinds, mirrored[0]]),
            np.ascontiguousarray(np.concatenate([brains, mirrored[1]])),
        )

    def likely_brain(self, head: Head) -> Plane:
        """(H, W), from 0 to 1, at the head's working size: how likely each pixel is brain."""
        bins = _bins(head)
        scores, chosen, poses = self._refined(bins, head, *self._first_choice(bins, head))
        best = np.argsort(-scores, kind="stable")[:_NUM_FUSED]
        weights = np.exp((scores[best] - scores[best[0]]) / _TEMPERATURE)
        laid = [_laid_over(head, self.brains[chosen[item]], poses[item]) for item in best]
        return np.average(laid, axis=0, weights=weights).astype(np.float32)

    @cached_property
    def _coarse_cells(self) -> NDArray[np.float32]:
        """(N * kinds, cells) 1 where a coarse cell is of that kind."""
        coarse = self.kinds[:, ::_FIRST_STRIDE, ::_FIRST_STRIDE].reshape(len(self.kinds), 1, -1)
        is_kind = coarse == np.arange(_NUM_KINDS)[:, None]
        return is_kind.reshape(-1, coarse.shape[-1]).astype(np.float32)

    def _first_choice(self, bins: Plane, head: Head) -> tuple[NDArray[np.intp], Poses]:
        """The slices worth refining, and the best of a few poses of each."""
        looked = _looked_up(bins, head, _FIRST_POSES)
        coarse = looked.reshape(-1, GRID, GRID)[:, ::_FIRST_STRIDE, ::_FIRST_STRIDE]
        coarse = coarse.reshape(len(_FIRST_POSES), -1)
        is_bin = (coarse.T[:, :, None] == np.arange(_NUM_BINS)).astype(np.float32)
        counts = self._coarse_cells @ is_bin.reshape(len(is_bin), -1)
        counts = counts.reshape(len(self.kinds), _NUM_KINDS, len(_FIRST_POSES), _NUM_BINS)
        scores = _mutual_information(counts.transpose(2, 0, 1, 3) * _FIRST_STRIDE**2)
        scores -= _departure(_FIRST_POSES)[:, None]
        chosen = np.argsort(-scores.max(axis=0), kind="stable")[:_NUM_REFINED]
        return chosen, _FIRST_POSES[scores[:, chosen].argmax(axis=0)]

    def _refined(
        self, bins: Plane, head: Head, chosen: NDArray[np.intp], poses: Poses
    ) -> tuple[NDArray[np.float32], NDArray[np.intp], Poses]:
        """Scores, slices and poses after a search along one part of the pose after another."""
        kinds = self.kinds[chosen].reshape(len(chosen), -1)
        scores = _scores(bins, head, kinds, poses)
        both = np.concatenate([kinds, kinds])
        rows = np.arange(len(chosen))
        for size, part in product(_STEP_SIZES, range(len(_STEPS))):
            tried = np.stack([poses, poses])
            step = _STEPS[part] * np.float32(size)
            if _IS_FACTOR[part]:
                tried[:, :, part] *= np.exp([[step], [-step]])
            else:
                tried[:, :, part] += [[step], [-step]]
            found = _scores(bins, head, both, tried.reshape(-1, len(_STEPS))).reshape(2, -1)
            side = found.argmax(axis=0)
            better = found[side, rows] > scores
            poses = np.where(better[:, None], tried[side, rows], poses)
            scores = np.where(better, found[side, rows], scores)
        return scores, chosen, poses


@lru_cache(maxsize=1)
def brain_atlas() -> BrainAtlas:
    """The atlas that comes along."""
    return BrainAtlas.read()


def _bins(head: Head) -> Plane:
    """(H, W): 0 in air, else from 1 on by quantiles of the head's grey values."""
    grey = _smooth(head.signal, head)
    inside = head.mask > 0
    ranked = np.sort(grey[inside])
    bounds = ranked[len(ranked) * np.arange(1, _NUM_GREYS) // _NUM_GREYS]
    return np.where(inside, 1 + np.searchsorted(bounds, grey), 0).astype(np.float32)


def _smooth(plane: Plane, head: Head) -> Plane:
    return cv2.GaussianBlur(plane, (0, 0), max(0.3, _BLUR * _CELL * head.radius))


def _looked_up(bins: Plane, head: Head, poses: Poses) -> NDArray[np.intp]:
    """(P, GRID * GRID) bins of the cells of the atlas' square in each pose."""
    scale, x, y, stretch, turn = (part[:, None, None] for part in poses.T)
    across, down = scale * stretch * _COLUMNS, scale / stretch * _ROWS
    columns = head.centre[0] + head.radius * (np.cos(turn) * across - np.sin(turn) * down + x)
    rows = head.centre[1] + head.radius * (np.sin(turn) * across + np.cos(turn) * down + y)
    found = cv2.remap(
        bins, columns.reshape(-1, GRID), rows.reshape(-1, GRID), cv2.INTER_NEAREST, borderValue=0
    )
    return found.reshape(len(poses), -1).astype(np.intp)


def _laid_over(head: Head, brain: Plane, pose: NDArray[np.float32]) -> Plane:
    """(H, W) an atlas slice's brain in a pose, at the head's pixels."""
    scale, x, y, stretch, turn = (float(part) for part in pose)
    columns, rows = np.meshgrid(
        *(np.arange(side, dtype=np.float32) for side in head.mask.shape[::-1])
    )
    right = (columns - head.centre[0]) / head.radius - x
    down = (rows - head.centre[1]) / head.radius - y
    across = (np.cos(turn) * right + np.sin(turn) * down) / (scale * stretch)
    along = (np.cos(turn) * down - np.sin(turn) * right) / (scale / stretch)
    return sample(brain, (across + _REACH) / _CELL - 0.5, (along + _REACH) / _CELL - 0.5)


def _scores(bins: Plane, head: Head, kinds: NDArray[np.uint8], poses: Poses) -> NDArray[np.float32]:
    """(P,) nats of mutual information, less a prior's, of atlas slices (P, cells) in poses."""
    size = _NUM_KINDS * _NUM_BINS
    places = kinds.astype(np.intp) * _NUM_BINS + _looked_up(bins, head, poses)
    places += size * np.arange(len(poses))[:, None]
    counts = np.bincount(places.ravel(), minlength=size * len(poses)).astype(np.float32)
    joint = counts.reshape(len(poses), _NUM_KINDS, _NUM_BINS)
    return _mutual_information(joint) - _departure(poses)


def _mutual_information(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """(...) in nats between the last two axes of counts (..., kinds, bins)."""
    counts = counts + np.float32(0.1)
    shares = counts / counts.sum(axis=(-2, -1), keepdims=True)
    return (
        _entropy(shares.sum(axis=-1)).sum(axis=-1)
        + _entropy(shares.sum(axis=-2)).sum(axis=-1)
        - _entropy(shares).sum(axis=(-2, -1))
    )


def _entropy(shares: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each share's part of the entropy, in nats."""
    return -shares * np.log(shares)


def _departure(poses: Poses) -> NDArray[np.float32]:
    """(P,) what poses cost that lie far off."""
    parts = np.where(_IS_FACTOR, np.log(np.maximum(poses, 1e-3)), poses)
    return _PRIOR * ((parts / _PRIOR_WIDTHS) ** 2).sum(axis=1)


def describe(image: NDArray[np.uint8], brain: NDArray[np.bool_]) -> BrainAtlas | None:
    """A slice (H, W) and its brain as an atlas of one; None where either is too small."""
    head = find_head(image)
    if head is None:
        return None
    height, width = head.mask.shape
    shrunk = cv2.resize(brain.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    columns, rows = head.centre[0] + head.radius * _COLUMNS, head.centre[1] + head.radius * _ROWS
    share = sample(_smooth(shrunk, head), columns, rows)
    grey = sample(_smooth(head.signal, head), columns, rows)
    inside = share > 0.5
    outside = (sample(head.mask.astype(np.float32), columns, rows) > 0.5) & ~inside
    if np.count_nonzero(inside) < 3 or np.count_nonzero(outside) < 6:
        return None
    kinds = np.zeros((GRID, GRID), np.uint8)
    for cells, first, quantiles in (
        (outside, 1, _OUTSIDE_QUANTILES),
        (inside, _FIRST_INSIDE, _INSIDE_QUANTILES),
    ):
        kinds[cells] = first + np.searchsorted(np.quantile(grey[cells], quantiles), grey[cells])
    return BrainAtlas(kinds[None], share[None])


def make_atlas(
    slices: Iterator[ReferenceSlice], num_slices: int
) -> tuple[BrainAtlas, NDArray[np.bool_]]:
    """The slices that stand for all best, and which of them face a side.

    One after another is taken: that which brings all slices nearest to one that is taken.
    """
    described, faces_side = [], []
    for one in slices:
        found = describe(one.image, one.brain)
        if found is not None:
            described.append(found)
            faces_side.append(one.plane == "sagittal")
    if not described:
        raise DataError("no slice of these volumes shows a head with a brain in it")
    kinds = np.concatenate([one.kinds for one in described])
    brains = np.concatenate([one.brains for one in described])
    flat_kinds, flat = kinds.reshape(len(kinds), -1), brains.reshape(len(brains), -1)
    size = flat.sum(axis=1)
    distance = np.empty((len(flat), len(flat)), np.float32)
    for row in range(len(flat)):
        overlap = 2.0 * np.minimum(flat[row], flat).sum(axis=1) / (size[row] + size)
        agreement = (flat_kinds[row] == flat_kinds).mean(axis=1)
        distance[row] = 1.0 - overlap + _LABEL_WEIGHT * (1.0 - agreement)
    nearest = np.full(len(flat), np.inf, np.float32)
    taken: list[int] = []
    for _ in range(min(num_slices, len(flat))):
        taken.append(int(np.minimum(nearest, distance).mean(axis=1).argmin()))
        nearest = np.minimum(nearest, distance[taken[-1]])
    return BrainAtlas(kinds[taken], brains[taken]), np.array(faces_side)[taken]


def _slices_to_make_it_of(folder: Path) -> Iterator[ReferenceSlice]:
    """Every sixth slice that shows enough brain; coronal and sagittal ones also without neck."""
    for head in find_heads(folder):
        for plane in ("axial", "coronal", "sagittal"):
            found = list(reference_slices(head, plane))
            largest = max(np.count_nonzero(one.brain) for one in found)
            enough = [one for one in found if np.count_nonzero(one.brain) > _MIN_BRAIN * largest]
            for one in enough[::_SPACING]:
                yield one
                if plane != "axial":
                    kept = round((1.0 - _CUT) * len(one.image))
                    yield ReferenceSlice(plane, one.image[:kept], one.brain[:kept])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m brainray.mri.brain_atlas",
        description="Make an atlas of brains of NAME.nii.gz and NAME_mask.nii.gz in a folder.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--out", metavar="FILE.npz", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        atlas, faces_side = make_atlas(_slices_to_make_it_of(given.folder), _NUM_SLICES)
    except BrainrayError as error:
        print(f"brain_atlas: {error}", file=sys.stderr)
        return 2
    brains = np.round(atlas.brains * 255.0).astype(np.uint8)
    np.savez_compressed(given.out, kinds=atlas.kinds, brains=brains, faces_side=faces_side)
    print(f"{given.out}: {len(brains)} slices")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
