"""Probability that a pixel of a slice is brain, from an atlas of slices with known brain masks.

Multi-atlas segmentation (Iglesias and Sabuncu, "Multi-atlas segmentation of biomedical images: a
survey", 2015): each of 200 atlas slices is aligned with the head by the scale, translation, stretch
and rotation that maximise the mutual information of a joint histogram (Maes et al., "Multimodality
image registration by maximization of mutual information", 1997), minus a penalty for extreme poses.
The brain masks of the best matches are averaged. The atlas has six labels (air; dark, medium and
bright outside the brain; dark and bright inside it). Mutual information only requires that a label
has a consistent appearance within a slice, so no contrast is assumed.

``brain_atlas.npz`` was made by `make_brain_atlas.py` from one head and two averages of many:
OpenNeuro's ds000031 (sub-01, ses-006), pydeface's mean head and the ICBM 152 nonlinear template of
2009 (their licences are in the file NOTICE). Their brains were segmented by MindGrab (Fani et al.,
"MindGrab for BrainChop", 2025). The settings below were chosen by the overlap with the brains of
five other heads and of phantoms, and by inspecting public slices.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.mri.head import Head, Plane, sample

_FILE = Path(__file__).with_suffix(".npz")

GRID = 32  # cells per side of the square on which slices are compared
_REACH = 1.5  # half side of the square around the head's centre, in radii of its inscribed circle
_CELL = 2.0 * _REACH / GRID
_BLUR = 0.35  # cells
_AXIS = (np.arange(GRID, dtype=np.float32) + 0.5) * _CELL - _REACH
_COLUMNS, _ROWS = np.meshgrid(_AXIS, _AXIS)

NUM_LABELS = 6  # 0 is air
_NUM_GREYS = 16  # of the slice to segment, by quantiles
_NUM_BINS = _NUM_GREYS + 1  # 0 is air

# A pose is (scale, x, y, stretch, rotation): lengths in radii, rotation in radians.
_SCALES = (0.9, 1.0, 1.12)
_FIRST_POSES = np.array(
    [
        *((*pose, 1.0, 0.0) for pose in product(_SCALES, (-0.1, 0.0, 0.1), (-0.12, 0.0, 0.12))),
        *((scale, 0.0, 0.0, stretch, 0.0) for scale, stretch in product(_SCALES, (0.85, 1.18))),
    ],
    np.float32,
)
_FIRST_STRIDE = 2  # every second cell is enough to select atlas slices for refinement
_NUM_REFINED = 24
_STEPS = np.array([0.05, 0.05, 0.05, 0.05, 0.07], np.float32)  # for each part of a pose
_IS_FACTOR = np.array([True, False, False, True, False])
_STEP_SIZES = (1.0, 1.0, 0.6, 0.4, 0.25)
_PRIOR_WIDTHS = np.array([0.15, 0.15, 0.15, 0.08, 0.15], np.float32)
_PRIOR = 0.005  # penalty in nats for a part of the pose that is off by one such width
_NUM_FUSED = 16
_TEMPERATURE = 0.025  # nats

Poses = NDArray[np.float32]  # (P, 5)


@dataclass(frozen=True)
class BrainAtlas:
    """N slices of heads, each on the square around its own head's centre."""

    labels: NDArray[np.uint8]
    """(N, GRID, GRID) label of each cell."""
    brains: Plane
    """(N, GRID, GRID) fraction of the cell that is brain, from 0 to 1."""

    @classmethod
    def read(cls, path: Path = _FILE) -> "BrainAtlas":
        """Read the atlas and add mirrored sagittal slices, as a face may look either way."""
        with np.load(path) as stored:
            labels, is_sagittal = stored["labels"], stored["is_sagittal"]
            brains = stored["brains"].astype(np.float32) / 255.0
        return cls(
            np.concatenate([labels, labels[is_sagittal, :, ::-1]]),
            np.concatenate([brains, brains[is_sagittal, :, ::-1]]),
        )

    def brain_probability(self, head: Head) -> Plane:
        """Probability (H, W), from 0 to 1, of each pixel at the head's working size."""
        bins = grey_bins(head)
        chosen, poses = self._first_choice(bins, head)
        scores, poses = self._refined(bins, head, self.labels[chosen], poses)
        best = np.argsort(-scores, kind="stable")[:_NUM_FUSED]
        weights = np.exp((scores[best] - scores[best[0]]) / _TEMPERATURE)
        warped = [_warped(head, self.brains[chosen[item]], poses[item]) for item in best]
        return np.average(warped, axis=0, weights=weights).astype(np.float32)

    def _first_choice(self, bins: Plane, head: Head) -> tuple[NDArray[np.intp], Poses]:
        """The slices to refine, and the best of a few poses for each."""
        coarse = _looked_up(bins, head, _FIRST_POSES)[:, ::_FIRST_STRIDE, ::_FIRST_STRIDE]
        coarse = coarse.reshape(len(_FIRST_POSES), -1)
        is_bin = (coarse[:, :, None] == np.arange(_NUM_BINS)).astype(np.float32)
        counts = np.tensordot(self._is_label, is_bin, axes=([2], [1]))  # (N, labels, P, bins)
        counts = (counts * _FIRST_STRIDE**2).astype(np.intp).transpose(2, 0, 1, 3)
        scores = _mutual_information(counts) - _departure(_FIRST_POSES)[:, None]
        chosen = np.argsort(-scores.max(axis=0), kind="stable")[:_NUM_REFINED]
        return chosen, _FIRST_POSES[scores[:, chosen].argmax(axis=0)]

    @cached_property
    def _is_label(self) -> NDArray[np.float32]:
        """(N, labels, coarse cells) 1 where the cell has the label."""
        coarse = self.labels[:, ::_FIRST_STRIDE, ::_FIRST_STRIDE].reshape(len(self.labels), 1, -1)
        return (coarse == np.arange(NUM_LABELS)[:, None]).astype(np.float32)

    def _refined(
        self, bins: Plane, head: Head, labels: NDArray[np.uint8], poses: Poses
    ) -> tuple[NDArray[np.float32], Poses]:
        """Scores and poses after a coordinate-wise search over the parts of the pose."""
        scores = _scores(bins, head, labels, poses)
        both = np.concatenate([labels, labels])
        rows = np.arange(len(labels))
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
        return scores, poses


@cache
def brain_atlas() -> BrainAtlas:
    """The atlas that is shipped with the package."""
    return BrainAtlas.read()


def grey_bins(head: Head) -> Plane:
    """(H, W): 0 in air, otherwise 1 to 16 by quantiles of the head's grey values."""
    grey = smooth(head.signal, head)
    inside = head.mask > 0
    ranked = np.sort(grey[inside])
    bounds = ranked[len(ranked) * np.arange(1, _NUM_GREYS) // _NUM_GREYS]
    return np.where(inside, 1 + np.searchsorted(bounds, grey), 0).astype(np.float32)


def smooth(plane: Plane, head: Head) -> Plane:
    """A plane of the head (H, W), blurred to the resolution of the cells."""
    return cv2.GaussianBlur(plane, (0, 0), max(0.3, _BLUR * _CELL * head.radius))


def on_square(plane: Plane, head: Head) -> Plane:
    """A plane of the head (H, W), sampled at the cells (GRID, GRID)."""
    x, y = head.centre
    return sample(plane, x + head.radius * _COLUMNS, y + head.radius * _ROWS)


def _looked_up(bins: Plane, head: Head, poses: Poses) -> NDArray[np.intp]:
    """Bins (P, GRID, GRID) at the cells of the atlas square in each pose."""
    scale, x, y, stretch, rotation = (part[:, None, None] for part in poses.T)
    across, down = scale * stretch * _COLUMNS, scale / stretch * _ROWS
    cosine, sine = np.cos(rotation), np.sin(rotation)
    columns = head.centre[0] + head.radius * (cosine * across - sine * down + x)
    rows = head.centre[1] + head.radius * (sine * across + cosine * down + y)
    found = cv2.remap(
        bins, columns.reshape(-1, GRID), rows.reshape(-1, GRID), cv2.INTER_NEAREST, borderValue=0
    )
    return found.reshape(len(poses), GRID, GRID).astype(np.intp)


def _warped(head: Head, brain: Plane, pose: NDArray[np.float32]) -> Plane:
    """The brain of an atlas slice (GRID, GRID) in a pose, at the head's pixels (H, W)."""
    scale, x, y, stretch, rotation = (float(part) for part in pose)
    cosine, sine = math.cos(rotation), math.sin(rotation)
    height, width = head.mask.shape
    right = (np.arange(width, dtype=np.float32) - head.centre[0]) / head.radius - x
    down = ((np.arange(height, dtype=np.float32) - head.centre[1]) / head.radius - y)[:, None]
    across = (cosine * right + sine * down) / (scale * stretch)
    along = (cosine * down - sine * right) / (scale / stretch)
    return sample(brain, (across + _REACH) / _CELL - 0.5, (along + _REACH) / _CELL - 0.5)


def _scores(
    bins: Plane, head: Head, labels: NDArray[np.uint8], poses: Poses
) -> NDArray[np.float32]:
    """Mutual information minus penalty (P,), in nats, of slices (P, GRID, GRID) in their poses."""
    size = NUM_LABELS * _NUM_BINS
    places = labels.astype(np.intp) * _NUM_BINS + _looked_up(bins, head, poses)
    places += size * np.arange(len(poses))[:, None, None]
    counts = np.bincount(places.ravel(), minlength=size * len(poses))
    by_label = counts.reshape(len(poses), NUM_LABELS, _NUM_BINS)
    return _mutual_information(by_label) - _departure(poses)


def _entropy_terms(num_pooled: int) -> NDArray[np.float32]:
    """-p log p for each number of cells, from 0 to GRID * GRID, with 0.1 added to each count."""
    added = 0.1
    counts = np.arange(GRID * GRID + 1) + added * num_pooled
    shares = counts / (GRID * GRID + added * NUM_LABELS * _NUM_BINS)
    return (-shares * np.log(shares)).astype(np.float32)


_LABEL_ENTROPY_TERMS, _BIN_ENTROPY_TERMS, _JOINT_ENTROPY_TERMS = (
    _entropy_terms(n) for n in (_NUM_BINS, NUM_LABELS, 1)
)


def _mutual_information(counts: NDArray[np.intp]) -> NDArray[np.float32]:
    """Mutual information (...), in nats, of cell counts (..., labels, bins)."""
    label_entropy = _LABEL_ENTROPY_TERMS[counts.sum(axis=-1)].sum(axis=-1)
    bin_entropy = _BIN_ENTROPY_TERMS[counts.sum(axis=-2)].sum(axis=-1)
    return np.asarray(label_entropy + bin_entropy - _JOINT_ENTROPY_TERMS[counts].sum(axis=(-2, -1)))


def _departure(poses: Poses) -> NDArray[np.float32]:
    """Penalty (P,), in nats, for the distance of poses (P, 5) from the identity."""
    parts = np.where(_IS_FACTOR, np.log(np.maximum(poses, 1e-3)), poses)
    return np.asarray(_PRIOR * ((parts / _PRIOR_WIDTHS) ** 2).sum(axis=1), np.float32)
