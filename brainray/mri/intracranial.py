"""Brain masks without skull, scalp, eyes, face and neck, from one slice of any plane or contrast.

Three steps at a fixed working size, so that neither speed nor result hangs on the input's:

1. **Head**: what stands out from the background, and its largest inscribed circle, whose centre
   and radius serve as origin and unit of length from here on.
2. **Atlas**: which of a few typical brain outlines lies over tissue that differs most from the
   rest of the head. The measure is the mutual information between grey value and inside/outside
   (Viola and Wells, "Alignment by maximization of mutual information", 1997), which assumes no
   contrast: dark or bright fluid, scalp or skull are all the same to it.
3. **Outline**: around that atlas the closed path of most support in polar coordinates, found by
   dynamic programming (Amini, Weymouth and Jain, "Using dynamic programming for solving
   variational problems in vision", 1990): it seeks steps from brain to the dark skull, stays off
   the scalp, and passes outside a lesion at the rim, since a lesion is no step into darkness.

The vertex (coronal, sagittal) or the face (axial) is expected at the top of the slice.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

MIN_CONFIDENCE = 0.45
"""Masks less sure than this are not to be used: `otsu_mask` takes their place."""

_WORK_SIZE = 160  # pixels on the longer side
_NUM_ANGLES = 64
_NUM_RADII = 64
_RUN_IN = 16  # angles
_GRID = 36  # cells a side of the square on which atlases are compared

# Lengths from here on in radii of the head's inscribed circle.
_GRID_REACH = 1.45
_CELL = 2.0 * _GRID_REACH / _GRID
_MAX_RADIUS = 1.75
_RADII = np.linspace(0.08, _MAX_RADIUS, _NUM_RADII, dtype=np.float32)
_STEP = float(_RADII[1] - _RADII[0])
_ANGLES = np.linspace(0.0, 2.0 * np.pi, _NUM_ANGLES, endpoint=False, dtype=np.float32)
_RAYS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)  # (angles, 2)

Plane = NDArray[np.float32]  # (H, W), or (angles, radii) where it says polar

# Set by eye on slices of the public data set, and by 24 outlines drawn on them by hand.
_HEAD_LEVEL = 0.45  # of the way from the background to Otsu's threshold
_MIN_HEAD_RADIUS = 12.0  # pixels at the working size
_NECK_WIDTH = 0.25  # of the frame's width

# Which outline to start from. Scores and penalties are in nats.
_NUM_GREYS = 10
_NUM_TEXTURES = 3
_SCALP = 0.10  # depth
_SCALP_PENALTY = 1.0  # for an outline all in the scalp
_ELLIPTIC = 0.95  # heads above it are likely cut across, those below show face or neck
_SHAPE_PENALTY = 3.0  # for each unit of ellipticity on the wrong side
_NECK_PENALTY = 0.1  # for axial outlines where there is a neck
_RING_DEPTHS = (0.10, 0.14, 0.18, 0.22, 0.27)
_ATLAS_SCALES = (0.93, 1.0, 1.06)
_ATLAS_SHIFTS = (-0.07, 0.0, 0.07)  # downwards
_TEMPERATURE = 0.005  # scores closer than this are averaged

# The path's score, for each angle.
_EDGE = 2.0  # for a step from brain to black
_GROWTH = 3.5  # for a radius through tissue
_BASE_GROWTH = 0.5  # share of growth that is granted outwards under the base
_BARRIER = 1.0  # for a radius beyond darkness
_SCALP_DEPTH = 0.14
_SHALLOW = 0.5  # for lying 0.04 too shallow
_TOLERANCE = 0.13
_PRIOR = 0.1  # for lying one tolerance off the expected radius
_VAULT_FREEDOM = 0.4  # share of that remitted outwards under the vault
_STIFFNESS = 0.1  # for a jump of one radius between neighbouring angles
_MAX_JUMP = 4

# Confidence.
_SCALP_RISE = 0.3  # of the brain's grey value
_GOOD_INFORMATION = 0.5  # share of inside/outside that grey values explain; more is no surer

# Typical brain outlines: origin (x, y) from the centre of the head's inscribed circle, and radii at
# equal angles, clockwise from the right, in hundredths. Drawn by hand on slices of the public data
# set, but for the last two, which follow the MNI152 template. Mirror images are added below.
_OUTLINES = (
    (  # sagittal
        (0, -0.28),
        "72 77 72 56 46 42 47 75 94 95 95 90 82 77 71 64 59 55 52 51 51 53 58 66",
    ),
    (  # sagittal
        (0, -0.28),
        "87 92 79 56 46 50 70 93 89 95 96 89 82 76 70 68 65 63 61 62 63 67 71 77",
    ),
    (  # sagittal
        (0, -0.28),
        "86 88 77 57 50 56 72 82 86 92 94 90 82 74 67 63 61 60 60 60 62 65 71 80",
    ),
    (  # sagittal, lateral
        (0, -0.28),
        "58 50 54 51 47 44 34 33 56 81 83 81 81 81 81 79 75 73 70 70 69 70 74 75",
    ),
    (  # sagittal
        (0, -0.28),
        "80 83 85 83 81 79 50 32 33 39 57 73 75 71 67 64 63 62 63 64 67 70 74 77",
    ),
    (  # sagittal
        (0, -0.28),
        "86 91 94 94 90 75 52 47 52 66 86 90 82 75 69 65 63 61 61 61 64 67 74 80",
    ),
    (  # sagittal
        (0, -0.28),
        "88 92 74 68 72 67 63 76 91 93 92 88 82 78 72 68 64 63 61 62 62 65 70 79",
    ),
    (  # sagittal
        (0, -0.28),
        "75 79 84 89 92 85 67 43 42 51 73 87 84 79 73 68 66 63 62 61 63 65 68 71",
    ),
    (  # coronal
        (0, -0.28),
        "74 72 65 39 19 17 16 17 19 39 65 72 74 75 80 88 92 94 95 94 92 88 80 75",
    ),
    (  # coronal
        (0, -0.28),
        "84 86 87 85 74 57 45 57 74 85 87 86 84 79 73 70 66 65 65 65 66 70 73 79",
    ),
    (  # coronal
        (0, -0.28),
        "79 82 88 93 89 84 84 84 89 93 88 82 79 76 73 69 66 63 63 63 66 69 73 76",
    ),
    (  # coronal
        (0, -0.28),
        "85 87 87 76 48 29 28 29 48 76 87 87 85 84 84 84 84 81 80 81 84 84 84 84",
    ),
    (  # coronal
        (0, -0.28),
        "85 82 73 61 56 54 54 54 56 61 73 82 85 84 82 78 75 71 71 71 75 78 82 84",
    ),
    (  # coronal
        (0, -0.28),
        "74 77 84 89 90 89 89 89 90 89 84 77 74 73 75 75 74 71 71 71 74 75 75 73",
    ),
    (  # coronal
        (0, -0.28),
        "85 88 89 84 72 54 45 54 72 84 89 88 85 83 80 77 71 68 69 68 71 77 80 83",
    ),
    (  # axial, basal
        (0, 0.15),
        "70 71 72 72 68 64 64 64 68 72 72 71 70 73 84 72 64 25 24 25 64 72 84 73",
    ),
    (  # axial, basal
        (0, 0.15),
        "72 66 63 67 73 71 72 71 73 67 63 66 72 78 85 95 110 115 114 115 110 95 85 78",
    ),
    (  # axial, cerebellum
        (0, 0.45),
        "62 66 62 53 46 43 43 43 46 53 62 66 62 54 46 42 38 36 36 36 38 42 46 54",
    ),
    (  # axial, basal
        (0, 0.15),
        "76 76 78 83 86 87 87 87 86 83 78 76 76 79 84 86 68 38 36 38 68 86 84 79",
    ),
    (  # axial, basal
        (0, 0.15),
        "66 67 71 70 66 63 63 63 66 70 71 67 66 72 77 69 51 20 19 20 51 69 77 72",
    ),
    (  # axial, basal
        (0, 0.15),
        "78 77 74 73 68 66 67 66 68 73 74 77 78 80 84 85 69 38 34 38 69 85 84 80",
    ),
    (  # axial, basal
        (0, 0.15),
        "65 67 72 73 72 68 69 68 72 73 72 67 65 69 73 60 51 23 22 23 51 60 73 69",
    ),
    (  # coronal, frontal
        (0, -0.7),
        "72 70 56 42 37 42 45 42 37 42 56 70 72 74 76 75 75 74 76 74 75 75 76 74",
    ),
    (  # sagittal, lateral
        (0, -0.28),
        "58 52 49 51 53 51 48 43 42 47 56 69 77 80 79 75 72 70 69 69 70 69 60 57",
    ),
    (  # axial
        (0, 0.15),
        "69 73 75 76 84 87 84 87 84 76 75 73 69 65 65 76 86 87 86 87 86 76 65 65",
    ),
    (  # axial
        (0, 0.15),
        "75 79 82 84 82 82 78 82 82 84 82 79 75 74 73 77 80 86 86 86 80 77 73 74",
    ),
)


@dataclass(frozen=True)
class IntracranialMask:
    """What lies within the skull."""

    mask: NDArray[np.bool_]
    """(H, W) True on brain, fluid around it and lesions."""
    confidence: float
    """0 to 1: the share of the outline beyond which scalp is seen, times how well grey values
    tell inside from outside. It is low where there is no skull or the outline lies amiss."""


@dataclass(frozen=True)
class _Head:
    mask: NDArray[np.uint8]  # (H, W) 0 or 1, without holes
    depth: Plane  # distance to the background in radii
    centre: NDArray[np.float32]  # x, y in pixels
    radius: float  # pixels
    ellipticity: float  # overlap with the ellipse of equal moments, up to 1
    has_neck: bool


@dataclass(frozen=True)
class _Atlas:
    """Candidate outlines, M of them."""

    inside: NDArray[np.float32]  # (M, grid * grid) 0 or 1
    origins: NDArray[np.float32]  # (M, 2) from where radii are measured
    radii: NDArray[np.float32]  # (M, angles)


@dataclass(frozen=True)
class _Outline:
    origin: NDArray[np.float32]  # (2,) x, y from the head's centre
    radii: NDArray[np.float32]  # (angles,) from the origin
    information: float  # share of inside/outside that grey values explain, 0 to 1


def intracranial_mask(image: NDArray[np.uint8]) -> IntracranialMask:
    """Mask of the brain in a slice (H, W), and how far to trust it.

    A slice without a head gets an all True mask at confidence 0.
    """
    height, width = image.shape
    scale = _WORK_SIZE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    head = _find_head(small)
    if head is None:
        return IntracranialMask(np.ones(image.shape, np.bool_), 0.0)
    signal = cv2.GaussianBlur(small, (0, 0), 0.8).astype(np.float32)
    signal = np.maximum(signal - np.percentile(signal, 3), 0.0)

    start = _choose_outline(signal, head)
    outline = replace(start, radii=_trace_outline(signal, head, start))
    points = head.centre + head.radius * (outline.origin + outline.radii[:, None] * _RAYS)
    mask = _fill(points, head.mask.shape) & head.mask
    full = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    informed = min(1.0, outline.information / _GOOD_INFORMATION)
    confidence = _share_of_shell(signal, head, outline) * informed
    return IntracranialMask(np.asarray(full > 0.5), confidence)


def _find_head(small: NDArray[np.uint8]) -> _Head | None:
    blurred = cv2.GaussianBlur(small, (0, 0), 1.2)
    otsu, _ = cv2.threshold(blurred, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    background = float(np.percentile(blurred, 3))
    # Scalp may outshine everything: skin and neck are found nearly half of Otsu's step up.
    binary = (blurred > background + _HEAD_LEVEL * (otsu - background)).astype(np.uint8)
    opened = cv2.morphologyEx(binary, cv2.MORPH_OPEN, _disc(2))
    num_labels, labels, stats, _ = cv2.connectedComponentsWithStats(opened)
    if num_labels == 1:
        return None
    largest = (labels == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])).astype(np.uint8)
    closed = _close(largest, 5)
    contours, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    mask = np.zeros_like(small)
    cv2.drawContours(mask, [max(contours, key=cv2.contourArea)], -1, 1, cv2.FILLED)

    # The frame bounds the head too.
    framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.distanceTransform(framed, cv2.DIST_L2, 5)[1:-1, 1:-1]
    radius = float(depth.max())
    if radius < _MIN_HEAD_RADIUS:
        return None
    rows, columns = np.nonzero(depth >= 0.97 * radius)
    centre = np.array([columns.mean(), rows.mean()], np.float32)
    # A neck leaves the frame at the bottom only; a head cropped tightly touches the top too.
    has_neck = bool(mask[-1].mean() - mask[0].mean() > _NECK_WIDTH)
    return _Head(mask, depth / np.float32(radius), centre, radius, _ellipticity(mask), has_neck)


def _choose_outline(signal: Plane, head: _Head) -> _Outline:
    """The candidate whose inside and outside differ most, averaged with those near it."""
    axis = (np.arange(_GRID, dtype=np.float32) + 0.5) * _CELL - _GRID_REACH
    columns = head.centre[0] + head.radius * np.broadcast_to(axis, (_GRID, _GRID))
    rows = head.centre[1] + head.radius * np.broadcast_to(axis[:, None], (_GRID, _GRID))
    cell = _CELL * head.radius  # pixels
    mean = cv2.GaussianBlur(signal, (0, 0), 0.4 * cell)
    wide_mean = cv2.GaussianBlur(signal, (0, 0), 0.8 * cell)
    variance = cv2.GaussianBlur(signal**2, (0, 0), 0.8 * cell) - wide_mean**2
    spread = np.sqrt(np.maximum(variance, 0.0))
    depth = _sample(head.depth, columns, rows).ravel()
    in_head = depth > 0.02
    greys = _quantile_bins(_sample(mean, columns, rows).ravel(), in_head, _NUM_GREYS)
    textures = _quantile_bins(_sample(spread, columns, rows).ravel(), in_head, _NUM_TEXTURES)
    num_bins = _NUM_GREYS * _NUM_TEXTURES

    cells = np.zeros((_GRID * _GRID, num_bins + 1), np.float32)
    cells[np.flatnonzero(in_head), (greys * _NUM_TEXTURES + textures)[in_head]] = 1.0
    cells[:, num_bins] = depth < _SCALP

    atlas = _atlas()
    rings, ring_radii = _head_rings(head, depth)
    inside = np.concatenate([atlas.inside, rings])
    counts = inside @ cells
    information = _mutual_information(counts[:, :num_bins], cells[:, :num_bins].sum(axis=0))
    origins = np.concatenate([atlas.origins, np.zeros((len(rings), 2), np.float32)])
    radii = np.concatenate([atlas.radii, ring_radii])
    in_scalp = counts[:, num_bins] / np.maximum(inside.sum(axis=1), 1.0)
    is_ring = np.arange(len(inside)) >= len(atlas.inside)
    roundness = head.ellipticity - _ELLIPTIC
    scores = (
        information
        - _SCALP_PENALTY * in_scalp
        - _SHAPE_PENALTY * np.where(is_ring, max(0.0, -roundness), max(0.0, roundness))
        - _NECK_PENALTY * (head.has_neck & (origins[:, 1] >= 0.0))
    )
    best = int(np.argmax(scores))
    weights = np.exp((scores - scores[best]) / _TEMPERATURE)
    weights *= (origins == origins[best]).all(axis=1)
    weights /= weights.sum()
    share = float(counts[best, :num_bins].sum() / in_head.sum())
    most = float(_entropy(np.array([[share, 1.0 - share]]))[0])
    return _Outline(origins[best], weights @ radii, float(information[best]) / most)


def _head_rings(
    head: _Head, depth: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The head's own outline shrunk by several depths, as further candidates."""
    polar_depth = _polar(head.depth, head, np.zeros(2, np.float32))
    outside = polar_depth <= 0.01
    first = np.where(outside.any(axis=1), outside.argmax(axis=1), _NUM_RADII - 1)
    outline = _smooth_circle(_RADII[first], 1.2)
    inside = np.stack([depth > ring for ring in _RING_DEPTHS]).astype(np.float32)
    return inside, np.stack([outline - np.float32(ring) for ring in _RING_DEPTHS])


def _trace_outline(signal: Plane, head: _Head, start: _Outline) -> NDArray[np.float32]:
    """Radii (angles,) of the best supported outline about the origin of the one to start from."""
    expected = start.radii
    depth = _polar(head.depth, head, start.origin)
    relative = np.minimum(_relative_to_brain(signal, head, start), 1.0)

    inner, outer = round(0.12 / _STEP), round(0.07 / _STEP)
    before = _mean_of_window(relative, 1 - inner, 0)
    after = _mean_of_window(relative, 1, outer)
    step = np.clip(before - after, 0.0, 1.0) * np.clip((depth - 0.04) / 0.05, 0.0, 1.0)

    # Under the vault, what lies deeper than the scalp is brain until darkness says otherwise:
    # there the outline may leave the expected one outwards. Under the base are face and neck.
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


def _share_of_shell(signal: Plane, head: _Head, outline: _Outline) -> float:
    """Share of rays that meet scalp outside the outline: bright, or brighter than what precedes.

    It is near 1 on whole heads and low on slices without a skull.
    """
    relative = _relative_to_brain(signal, head, outline)
    beyond = (outline.radii[:, None] - _STEP < _RADII) & (
        _polar(head.depth, head, outline.origin) > 0
    )
    darkest = np.minimum.accumulate(np.where(beyond, relative, np.inf), axis=1)
    rises = np.where(beyond, relative - darkest, 0.0).max(axis=1) > _SCALP_RISE
    bright = np.where(beyond, relative, 0.0).max(axis=1) > 1.0 + _SCALP_RISE
    return float((rises | bright).mean())


def _relative_to_brain(signal: Plane, head: _Head, outline: _Outline) -> Plane:
    """Polar grey values over those typical within the outline in about the same direction."""
    grey = _polar(signal, head, outline.origin)
    within = _index_of(outline.radii[:, None] * np.linspace(0.2, 0.85, 16, dtype=np.float32))
    level = np.median(np.take_along_axis(grey, within, axis=1), axis=1)
    typical = float(np.median(level))
    level = _smooth_circle(np.clip(level, 0.7 * typical, 1.4 * typical), 4.0)
    return np.asarray(grey / np.maximum(level, 1.0)[:, None], np.float32)


def _index_of(radii: NDArray[np.float32]) -> NDArray[np.intp]:
    """The nearest places in `_RADII`."""
    return np.clip(np.round((radii - _RADII[0]) / _STEP), 0, _NUM_RADII - 1).astype(np.intp)


def _best_closed_path(score: Plane) -> NDArray[np.intp]:
    """Radius index (angles,) of the closed path of the greatest sum of scores (angles, radii).

    Neighbouring angles differ by at most `_MAX_JUMP` radii and pay for the square of it. The
    search runs in before the turn that is kept and runs out after it, over the same scores, so
    that both ends have forgotten where they began and meet.
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


@lru_cache(maxsize=1)
def _atlas() -> _Atlas:
    """The typical outlines, their mirror images, and both a little larger, smaller and shifted."""
    inside, origins, radii = [], [], []
    for origin, hundredths in _OUTLINES:
        drawn = np.array(hundredths.split(), np.float32) / 100.0
        mirrored = np.roll(drawn[::-1], 1 + len(drawn) // 2)
        for shape in (drawn, mirrored) if np.abs(drawn - mirrored).max() > 0.02 else (drawn,):
            angles = np.linspace(0.0, 2.0 * np.pi, len(shape), endpoint=False)
            full = np.interp(_ANGLES, angles, shape, period=2.0 * np.pi).astype(np.float32)
            for scale in _ATLAS_SCALES:
                for shift in _ATLAS_SHIFTS:
                    points = scale * full[:, None] * _RAYS + np.array([0.0, shift], np.float32)
                    moved = _radii_of(points)
                    cells = (origin + moved[:, None] * _RAYS + _GRID_REACH) / _CELL - 0.5
                    inside.append(_fill(cells, (_GRID, _GRID)).ravel().astype(np.float32))
                    origins.append(origin)
                    radii.append(moved)
    return _Atlas(np.stack(inside), np.asarray(origins, np.float32), np.stack(radii))


def _radii_of(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Radii at `_ANGLES` of a closed polygon (V, 2) around the origin."""
    angles = np.arctan2(points[:, 1], points[:, 0])
    lengths = np.hypot(points[:, 0], points[:, 1])
    return np.interp(_ANGLES, angles, lengths, period=2.0 * np.pi).astype(np.float32)


def _mutual_information(
    inside: NDArray[np.float32], total: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(M,) in nats between bin and side, from counts (M, bins) and (bins,)."""
    outside = np.maximum(total - inside, 0.0)
    share = inside.sum(axis=1) / max(float(total.sum()), 1.0)
    within = share * _entropy(inside + 0.3) + (1.0 - share) * _entropy(outside + 0.3)
    return _entropy(total[None] + 0.3) - within


def _entropy(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    shares = counts / counts.sum(axis=1, keepdims=True)
    return -(shares * np.log(shares)).sum(axis=1)


def _quantile_bins(
    values: NDArray[np.float32], valid: NDArray[np.bool_], num_bins: int
) -> NDArray[np.intp]:
    ranked = np.sort(values[valid])
    bounds = ranked[len(ranked) * np.arange(1, num_bins) // num_bins]
    return np.searchsorted(bounds, values)


def _polar(plane: Plane, head: _Head, origin: NDArray[np.float32]) -> Plane:
    """The plane along rays from the origin: (angles, radii)."""
    x, y = head.centre + head.radius * origin
    reach = head.radius * _RADII
    return _sample(plane, x + _RAYS[:, :1] * reach, y + _RAYS[:, 1:] * reach)


def _sample(plane: Plane, columns: NDArray[np.float32], rows: NDArray[np.float32]) -> Plane:
    return cv2.remap(plane, columns.astype(np.float32), rows.astype(np.float32), cv2.INTER_LINEAR)


def _mean_of_window(values: Plane, first: int, last: int) -> Plane:
    """Mean over the radii from `first` to `last`, relative to each one and inclusive."""
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


def _ellipticity(mask: NDArray[np.uint8]) -> float:
    """Intersection over union with the ellipse of equal moments."""
    moments = cv2.moments(mask, binaryImage=True)
    area = moments["m00"]
    covariance = np.array([[moments["mu20"], moments["mu11"]], [moments["mu11"], moments["mu02"]]])
    variances, axes = np.linalg.eigh(covariance / area)
    minor, major = 4.0 * np.sqrt(np.maximum(variances, 1e-6))
    angle = float(np.degrees(np.arctan2(axes[1, 1], axes[0, 1])))
    ellipse = np.zeros_like(mask)
    box = ((moments["m10"] / area, moments["m01"] / area), (float(major), float(minor)), angle)
    cv2.ellipse(ellipse, box, 1, cv2.FILLED)
    return float((ellipse & mask).sum() / (ellipse | mask).sum())


def _fill(points: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Polygon (V, 2) of x, y as a 0/1 mask."""
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.round(points * 16.0).astype(np.int32)], 1, shift=4)
    return mask


def _close(mask: NDArray[np.uint8], radius: float) -> NDArray[np.uint8]:
    """Closing with a disc; what lies beyond the frame counts as background."""
    reach = max(1, round(radius))
    framed = cv2.copyMakeBorder(mask, reach, reach, reach, reach, cv2.BORDER_CONSTANT, value=0)
    closed = cv2.morphologyEx(framed, cv2.MORPH_CLOSE, _disc(reach))
    return np.ascontiguousarray(closed[reach:-reach, reach:-reach])


def _disc(radius: int) -> NDArray[np.uint8]:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
