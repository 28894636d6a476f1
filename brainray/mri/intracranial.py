"""Brain masks without skull, scalp, eyes, face and neck, for a slice of any plane or contrast.

There are three steps, at a fixed working size so that neither speed nor result depends on the
input's:

1. **Head** (`head.py`): the foreground and its largest inscribed circle, whose centre and radius
   are the origin and unit length from here on.
2. **Atlas** (`brain_atlas.py`): the brain region of the most similar slices of other heads. For an
   elliptic head, cut above the face, its own outline moved inwards is used if that separates grey
   values better.
3. **Outline**: starting from that region, the closed path with the best score in polar coordinates,
   found by dynamic programming (Amini, Weymouth and Jain, "Using dynamic programming for solving
   variational problems in vision", 1990). The score favours steps from brain to the dark skull and
   penalises the scalp. The path passes outside a lesion at the rim, as a lesion is not a step into
   darkness.

The vertex (coronal, sagittal) or the face (axial) is expected at the top of the slice.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.mri.brain_atlas import brain_atlas, grey_bins
from brainray.mri.head import Head, Plane, find_head, sample

VERSION = 3
"""Version of the masks, to be increased with every change of a mask. Stores made with a different
version are not continued, and runs trained on a different version do not predict."""

MIN_CONFIDENCE = 0.45
"""Masks with a lower confidence should not be used: `otsu_mask` replaces them."""

_NUM_ANGLES = 64
_NUM_RADII = 64
_RUN_IN = 16  # angles

# Lengths from here on are in radii of the head's inscribed circle.
_RADII = np.linspace(0.08, 1.75, _NUM_RADII, dtype=np.float32)
_STEP = float(_RADII[1] - _RADII[0])
_ANGLES = np.linspace(0.0, 2.0 * np.pi, _NUM_ANGLES, endpoint=False, dtype=np.float32)
_RAYS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)  # (angles, 2)

Polar = NDArray[np.float32]  # (angles, radii)

# Tuned by eye on slices of the public data set, with 24 outlines drawn on them by hand, and on five
# heads with reference masks.

# Terms of the path's score, for each angle.
_EDGE = 2.0  # for a step from brain to black
_GROWTH = 4.0  # for a radius through tissue
_BASE_GROWTH = 0.3  # share of growth allowed outwards at the base
_BARRIER = 1.0  # for a radius beyond a dark region
_SCALP_DEPTH = 0.14
_SHALLOW = 0.5  # for being 0.04 too shallow
_TOLERANCE = 0.13
_PRIOR = 0.2  # for being one tolerance off the expected radius
_VAULT_FREEDOM = 0.7  # share of the prior waived outwards at the vault
_STIFFNESS = 0.05  # for a jump of one radius between neighbouring angles
_MAX_JUMP = 4

# The initial outline.
_ELLIPTIC = 0.955  # overlap with an ellipse: heads above this show neither face nor neck
_RING_DEPTHS = (0.08, 0.12, 0.16, 0.2, 0.26)
_RING_LEAD = 0.05  # nats

# Confidence.
_SCALP_RISE = 0.3  # of the brain's grey value
_LEAST_INFORMATION = 0.02  # share of inside/outside explained by grey values: noise has .008


@dataclass(frozen=True)
class IntracranialMask:
    """Mask of the inside of the skull."""

    mask: NDArray[np.bool_]
    """(H, W) True on brain, fluid around it and lesions."""
    confidence: float
    """0 to 1: the share of the outline with scalp beyond it, reduced if grey values hardly separate
    inside from outside. It is low for noise and without a skull, but a wrong outline in a complete
    head, such as one upside down, may still get a high value."""


@dataclass(frozen=True)
class _Outline:
    origin: NDArray[np.float32]  # (2,) x, y from the head's centre
    radii: NDArray[np.float32]  # (angles,) from the origin


def intracranial_mask(image: NDArray[np.uint8]) -> IntracranialMask:
    """Mask of the brain in a slice (H, W), and its confidence.

    If no head or no brain is found, the mask is all True with confidence 0.
    """
    head = find_head(image)
    if head is None:
        return IntracranialMask(np.ones(image.shape, np.bool_), 0.0)
    bins = grey_bins(head)
    likely = _likely_brain(head, bins)
    start = _outline_of(likely, head)
    if start is None:
        return IntracranialMask(np.ones(image.shape, np.bool_), 0.0)
    outline = replace(start, radii=_trace_outline(head, start))
    points = head.centre + head.radius * (outline.origin + outline.radii[:, None] * _RAYS)
    mask = _fill(points, head.mask.shape) & head.mask
    full = cv2.resize(mask.astype(np.float32), image.shape[::-1], interpolation=cv2.INTER_LINEAR)
    informed = min(1.0, _information(head, bins, likely)[1] / _LEAST_INFORMATION)
    return IntracranialMask(np.asarray(full > 0.5), _share_of_shell(head, outline) * informed)


def _likely_brain(head: Head, bins: Plane) -> NDArray[np.bool_]:
    """Initial brain mask (H, W), at the head's working size."""
    atlas_mask = brain_atlas().brain_probability(head) > 0.5
    if _ellipticity(head.mask) < _ELLIPTIC:
        return atlas_mask
    rings = [head.depth > depth for depth in _RING_DEPTHS]
    gains = [_information(head, bins, ring)[0] for ring in rings]
    better = max(gains) > _information(head, bins, atlas_mask)[0] + _RING_LEAD
    return rings[int(np.argmax(gains))] if better else atlas_mask


def _ellipticity(mask: NDArray[np.uint8]) -> float:
    """Intersection over union with the ellipse that has the same moments."""
    moments = cv2.moments(mask, binaryImage=True)
    area = moments["m00"]
    covariance = np.array([[moments["mu20"], moments["mu11"]], [moments["mu11"], moments["mu02"]]])
    variances, axes = np.linalg.eigh(covariance / area)
    minor, major = (float(axis) for axis in 4.0 * np.sqrt(np.maximum(variances, 1e-6)))
    angle = float(np.degrees(np.arctan2(axes[1, 1], axes[0, 1])))
    centre = (moments["m10"] / area, moments["m01"] / area)
    ellipse = np.zeros_like(mask)
    cv2.ellipse(ellipse, (centre, (major, minor), angle), 1, cv2.FILLED)
    return float((ellipse & mask).sum() / (ellipse | mask).sum())


def _outline_of(likely: NDArray[np.bool_], head: Head) -> _Outline | None:
    """The outer radii of the likely brain, around the centre of its largest component."""
    brain = (likely & (head.mask > 0)).astype(np.uint8)
    num_labels, labels, stats, centroids = cv2.connectedComponentsWithStats(brain)
    if num_labels == 1:
        return None
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    x, y = centroids[largest]
    if labels[round(y), round(x)] != largest:  # the component curves around its centroid
        depth = cv2.distanceTransform((labels == largest).astype(np.uint8), cv2.DIST_L2, 5)
        y, x = np.unravel_index(depth.argmax(), depth.shape)
    origin = ((np.array([x, y]) - head.centre) / head.radius).astype(np.float32)
    inside = _polar(likely.astype(np.float32), head, origin) > 0.5
    farthest = _NUM_RADII - 1 - inside[:, ::-1].argmax(axis=1)
    return _Outline(origin, _RADII[np.where(inside.any(axis=1), farthest, 0)])


def _trace_outline(head: Head, start: _Outline) -> NDArray[np.float32]:
    """Radii (angles,) of the best-scoring outline, around the origin of the initial one."""
    expected = start.radii
    depth = _polar(head.depth, head, start.origin)
    relative = np.minimum(_relative_to_brain(head, start), 1.0)

    inner, outer = round(0.12 / _STEP), round(0.07 / _STEP)
    before = _mean_of_window(relative, 1 - inner, 0)
    after = _mean_of_window(relative, 1, outer)
    step = np.clip(before - after, 0.0, 1.0) * np.clip((depth - 0.04) / 0.05, 0.0, 1.0)

    # At the vault, everything deeper than the scalp is brain up to the first dark region, so the
    # outline may move outwards from the expected one. Below the base are face and neck.
    base_depth, transition = 0.55, 0.2
    at_outline = depth[np.arange(_NUM_ANGLES), _index_of(expected)]
    vault = np.clip((base_depth - at_outline) / transition, 0.0, 1.0)[:, None]
    tissue = np.clip((relative - 0.3) / 0.4, -0.5, 1.0)
    offset = _RADII - expected[:, None]
    growth = np.where(
        offset < 0, np.maximum(tissue, 0.3), tissue * (_BASE_GROWTH + (1.0 - _BASE_GROWTH) * vault)
    )
    dark = np.clip((0.55 - relative) / 0.4, 0.0, 1.0) * (offset > -0.3 * expected[:, None])
    crossed = np.minimum(np.cumsum(dark, axis=1) * _STEP / 0.1, 1.5)

    departure = np.minimum((offset / _TOLERANCE) ** 2, 16.0)
    departure *= np.where(offset > 0, 1.0 - _VAULT_FREEDOM * vault, 1.0)
    score = (
        np.cumsum(_GROWTH * growth - _BARRIER * crossed, axis=1) * _STEP
        + _EDGE * step
        - _SHALLOW * np.clip((_SCALP_DEPTH - depth) / 0.04, 0.0, 4.0)
        - _PRIOR * departure
    )
    return _smooth_circle(_RADII[_best_closed_path(score.astype(np.float32))], 0.7)


def _share_of_shell(head: Head, outline: _Outline) -> float:
    """Share of rays that cross scalp outside the outline: bright, or with a rise in brightness.

    It is near 1 for complete heads and low for slices without a skull.
    """
    relative = _relative_to_brain(head, outline)
    beyond = (outline.radii[:, None] - _STEP < _RADII) & (
        _polar(head.depth, head, outline.origin) > 0
    )
    darkest = np.minimum.accumulate(np.where(beyond, relative, np.inf), axis=1)
    rises = np.where(beyond, relative - darkest, 0.0).max(axis=1) > _SCALP_RISE
    bright = np.where(beyond, relative, 0.0).max(axis=1) > 1.0 + _SCALP_RISE
    return float((rises | bright).mean())


def _information(head: Head, bins: Plane, inside: NDArray[np.bool_]) -> tuple[float, float]:
    """Mutual information of ``inside`` (H, W) and `grey_bins` within the head.

    Returned in nats, and as a share of the entropy of ``inside``.
    """
    in_head = head.mask > 0
    greys = bins[in_head].astype(np.intp)
    counts = np.bincount(2 * greys + inside[in_head], minlength=2 * (greys.max() + 1))
    shares = (counts.reshape(-1, 2) + 0.1) / (counts + 0.1).sum()
    side_entropy = _entropy(shares.sum(axis=0))
    information = side_entropy + _entropy(shares.sum(axis=1)) - _entropy(shares)
    return information, information / side_entropy


def _entropy(shares: NDArray[np.float64]) -> float:
    return float(-(shares * np.log(shares)).sum())


def _relative_to_brain(head: Head, outline: _Outline) -> Polar:
    """Polar grey values relative to those typical within the outline in a similar direction."""
    grey = _polar(head.signal, head, outline.origin)
    within = _index_of(outline.radii[:, None] * np.linspace(0.2, 0.85, 16, dtype=np.float32))
    level = np.median(np.take_along_axis(grey, within, axis=1), axis=1)
    typical = float(np.median(level))
    level = _smooth_circle(np.clip(level, 0.7 * typical, 1.4 * typical), 4.0)
    return np.asarray(grey / np.maximum(level, 1.0)[:, None], np.float32)


def _index_of(radii: NDArray[np.float32]) -> NDArray[np.intp]:
    """Indices of the nearest values in `_RADII`."""
    return np.clip(np.round((radii - _RADII[0]) / _STEP), 0, _NUM_RADII - 1).astype(np.intp)


def _best_closed_path(score: Polar) -> NDArray[np.intp]:
    """Radius index (angles,) of the closed path with the largest sum of scores (angles, radii).

    Neighbouring angles differ by at most `_MAX_JUMP` radii, with a quadratic penalty. The search
    starts before the turn that is kept and continues after it, over the same scores, so that both
    ends hardly depend on where it starts and usually meet, though nothing forces them to.
    """
    jumps = np.arange(-_MAX_JUMP, _MAX_JUMP + 1)
    cost = (_STIFFNESS * jumps**2).astype(np.float32)[:, None]
    num_steps = _NUM_ANGLES + 2 * _RUN_IN
    padded = np.full(_NUM_RADII + 2 * _MAX_JUMP, -np.inf, np.float32)
    best = padded[_MAX_JUMP:-_MAX_JUMP]
    neighbours = np.lib.stride_tricks.sliding_window_view(padded, _NUM_RADII)  # (jumps, radii)
    choices = np.empty((num_steps, _NUM_RADII), np.intp)
    best[:] = 0.0
    for step in range(num_steps):
        candidates = neighbours - cost
        candidates.argmax(axis=0, out=choices[step])
        np.add(candidates.max(axis=0), score[(step - _RUN_IN) % _NUM_ANGLES], out=best)
    radius = int(best.argmax())
    path = np.empty(num_steps, np.intp)
    for step in range(num_steps - 1, -1, -1):
        path[step] = radius
        radius += choices[step, radius] - _MAX_JUMP
    return path[_RUN_IN : _RUN_IN + _NUM_ANGLES]


def _polar(plane: Plane, head: Head, origin: NDArray[np.float32]) -> Polar:
    """The plane sampled along rays from the origin, (angles, radii)."""
    x, y = head.centre + head.radius * origin
    reach = head.radius * _RADII
    return sample(plane, x + _RAYS[:, :1] * reach, y + _RAYS[:, 1:] * reach)


def _mean_of_window(values: Polar, first: int, last: int) -> Polar:
    """Mean over the radii from `first` to `last`, relative to each radius and inclusive."""
    margin = max(-first, last)
    padded = np.pad(values, ((0, 0), (margin + 1, margin)), mode="edge")
    sums = np.cumsum(padded, axis=1)
    stop, start = margin + 1 + last, margin + first
    count = values.shape[1]
    total = sums[:, stop : stop + count] - sums[:, start : start + count]
    return total / np.float32(last - first + 1)


def _smooth_circle(values: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Gaussian smoothing of values around a circle (angles,)."""
    turns = np.concatenate([values] * 3).astype(np.float32)
    smooth = cv2.GaussianBlur(turns[None], (0, 0), sigma)[0]
    return smooth[len(values) : 2 * len(values)]


def _fill(points: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Rasterise a polygon (V, 2) of x, y to a 0/1 mask."""
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.round(points * 16.0).astype(np.int32)], 1, shift=4)
    return mask
