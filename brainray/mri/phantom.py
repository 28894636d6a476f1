"""Phantoms: head slices generated from a seed, in the data set's four classes, with true masks.

They replace patients in tests and demonstrations, and provide what real slices do not have: a
brain mask, a lesion mask and a known subject. They are caricatures, suitable for testing the code
but not for judging how well anything works on patients.

Only the lesion depends on the class. A generator's first draw seeds the head (anatomy, contrast,
pose, bias field) and the second one the scanner's noise. Both are the same for every class, so
neither brightness nor pose reveals it: classes differ only in the position and appearance of the
lesion. For the same reason the slice level has the same distribution for all classes, which is not
realistic: a real pituitary tumour is visible in basal slices only.

Head coordinates: x to the right, y down, the canvas spans -1 to 1 on both axes. Sagittal heads
are drawn facing right; half of them are mirrored by the pose.
"""

import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.errors import DataError
from brainray.mri.slices import ORIENTATIONS

CLASSES: tuple[str, ...] = ("glioma", "meningioma", "notumor", "pituitary")
SPLITS: tuple[str, ...] = ("Training", "Testing")

JPEG_QUALITY = 90
MIN_SIZE = 32

_NUM_VERTICES = 72
_VERTEX_ANGLES = np.linspace(0.0, 2.0 * np.pi, _NUM_VERTICES, endpoint=False)
_SUBPIXEL_BITS = 4  # OpenCV's fixed-point vertices: a sixteenth of a pixel
_MAX_SERIES_STEP = 0.12  # between neighbouring slices of a series, in half depths of the head
_MAX_SERIES_REACH = 0.7  # beyond this the lesion would be too small for its label

Curve = NDArray[np.float64]  # (V,): relative radii at _VERTEX_ANGLES
Points = NDArray[np.float64]  # (V, 2): x, y of a closed polygon or of a line, in head coordinates
Plane = NDArray[np.float32]  # (H, W)
Mask = NDArray[np.bool_]  # (H, W)


@dataclass(frozen=True)
class PhantomSlice:
    """One slice and its ground truth. All three arrays have the same (H, W)."""

    image: NDArray[np.uint8]
    """(H, W) grey values; air is near zero."""
    brain_mask: Mask
    """(H, W) True inside the skull: parenchyma, ventricles, subarachnoid space and the lesion."""
    lesion_mask: Mask
    """(H, W) True on the tumour with its necrotic core, without oedema; all False in `notumor`."""
    orientation: str
    """One of `ORIENTATIONS`."""


def make_slice(
    class_name: str, rng: np.random.Generator, size: int = 224, orientation: str | None = None
) -> PhantomSlice:
    """Draw one slice of a new subject.

    Args:
        class_name: one of `CLASSES`.
        rng: the only source of randomness. The same state gives the same head for every class,
            with a different lesion.
        size: height and width in pixels, at least `MIN_SIZE`.
        orientation: one of `ORIENTATIONS`; drawn at random when None.

    Raises:
        DataError: the class, the orientation or the size is not supported.
    """
    _check_request(class_name, size, orientation)
    subject_seed, noise_seed = (int(seed) for seed in rng.integers(2**63, size=2))
    subject = _draw_subject(subject_seed, class_name, orientation)
    return _render(subject, subject.offset, np.random.default_rng(noise_seed), size)


def make_series(
    class_name: str, rng: np.random.Generator, num_slices: int, size: int = 224
) -> list[PhantomSlice]:
    """Draw neighbouring parallel slices of one new subject: one head, one lesion, one contrast.

    Anatomy and lesion change smoothly from slice to slice, and every slice shows the lesion; each
    slice has its own noise. Long series are spaced more finely instead of leaving the lesion.

    Raises:
        DataError: as in `make_slice`, or `num_slices` is below 1.
    """
    _check_request(class_name, size, None)
    if num_slices < 1:
        raise DataError(f"num_slices is {num_slices}: a series needs at least 1 slice")
    subject_seed, noise_seed = (int(seed) for seed in rng.integers(2**63, size=2))
    subject = _draw_subject(subject_seed, class_name, None)
    noise_rng = np.random.default_rng(noise_seed)
    reach = min(_MAX_SERIES_REACH, _MAX_SERIES_STEP * (num_slices - 1) / 2)
    offsets = np.linspace(-reach, reach, num_slices)
    return [_render(subject, float(offset), noise_rng, size) for offset in offsets]


def write_phantoms(
    folder: Path,
    *,
    num_training_per_class: int,
    num_testing_per_class: int,
    seed: int,
    size: int = 224,
) -> None:
    """Write `Training/<class>/*.jpg` and `Testing/<class>/*.jpg` into a new folder.

    A slice depends only on (seed, split, class, index): with larger counts, the earlier files are
    unchanged, byte for byte with the same version of OpenCV, which does the drawing and the JPEG
    encoding. Everything is written next to `folder` and renamed at the end, so that `folder` is
    either complete or absent.

    Raises:
        DataError: `folder` exists and is not empty, or a count, the seed or the size is out of
            range.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not empty: remove it or choose another folder")
    num_per_class = dict(zip(SPLITS, (num_training_per_class, num_testing_per_class), strict=True))
    for split, count in num_per_class.items():
        if count < 0:
            raise DataError(f"{count} {split} slices per class: choose 0 or more")
    if seed < 0:
        raise DataError(f"seed is {seed}: choose 0 or more")
    _check_request(CLASSES[0], size, None)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        unfinished = Path(staging) / folder.name
        for split_index, (split, count) in enumerate(num_per_class.items()):
            for class_index, class_name in enumerate(CLASSES):
                class_folder = unfinished / split / class_name
                class_folder.mkdir(parents=True)
                for index in range(count):
                    rng = np.random.default_rng([seed, split_index, class_index, index])
                    image = make_slice(class_name, rng, size).image
                    _write_jpeg(class_folder / f"{class_name}_{index:05d}.jpg", image)
        unfinished.rename(folder)


def _write_jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    path.write_bytes(encoded.tobytes())


def _check_request(class_name: str, size: int, orientation: str | None) -> None:
    if class_name not in CLASSES:
        raise DataError(f"unknown phantom class {class_name!r}: choose from {', '.join(CLASSES)}")
    if orientation is not None and orientation not in ORIENTATIONS:
        raise DataError(
            f"unknown orientation {orientation!r}: choose from {', '.join(ORIENTATIONS)}"
        )
    if size < MIN_SIZE:
        raise DataError(f"a slice of {size} pixels is too small: choose {MIN_SIZE} or more")


# --- Subjects ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tissues:
    """Signal of each tissue in one contrast, from 0 (air) to about 1."""

    bone: float
    fluid: float
    grey: float
    white: float
    fat: float
    muscle: float
    vessel: float
    lesion: float
    necrosis: float
    oedema: float


# Stylised intensities, not measured ones. T1 is with contrast agent, as in the data set.
_CONTRASTS: dict[str, _Tissues] = {
    "t1": _Tissues(0.05, 0.12, 0.36, 0.46, 0.85, 0.30, 0.70, 0.88, 0.14, 0.25),
    "t2": _Tissues(0.04, 0.80, 0.50, 0.38, 0.66, 0.22, 0.10, 0.90, 1.00, 0.68),
    "flair": _Tissues(0.04, 0.10, 0.48, 0.40, 0.68, 0.28, 0.15, 0.90, 0.16, 0.62),
}
_CONTRAST_SHARES = {"t1": 0.65, "t2": 0.1, "flair": 0.25}


@dataclass(frozen=True)
class _Subject:
    """Properties shared by neighbouring slices of one head."""

    class_name: str
    orientation: str
    tissues: _Tissues
    anatomy_seed: int
    """Replayed for every slice of the subject, so that heads differ only by their offset."""
    lesion_seed: int
    pose_seed: int
    offset: float
    """Position of a single slice of this subject, -1 to 1 along the slice axis; 0 is the centre."""


def _draw_subject(seed: int, class_name: str, orientation: str | None) -> _Subject:
    rng = np.random.default_rng(seed)
    drawn_orientation = str(rng.choice(ORIENTATIONS))
    contrast = _CONTRASTS[str(rng.choice(list(_CONTRASTS), p=list(_CONTRAST_SHARES.values())))]
    signals = {
        field.name: getattr(contrast, field.name) * rng.uniform(0.88, 1.12)
        for field in fields(_Tissues)
    }
    anatomy_seed, lesion_seed, pose_seed = (int(part) for part in rng.integers(2**63, size=3))
    return _Subject(
        class_name=class_name,
        orientation=orientation or drawn_orientation,
        tissues=_Tissues(**signals),
        anatomy_seed=anatomy_seed,
        lesion_seed=lesion_seed,
        pose_seed=pose_seed,
        offset=float(rng.uniform(-0.5, 0.5)),
    )


@dataclass(frozen=True)
class _Skull:
    """Geometry of the inside of the skull, as needed to place lesions."""

    outline: Points
    """Inner table of the skull vault around the cerebrum."""
    mask: Mask
    """True inside the skull, including the hindbrain."""
    sella: tuple[float, float]
    """Position of the pituitary gland."""
    vault: tuple[float, float]
    """Range of vertex angles (radians, clockwise from +x as y points down) above the base."""


def _render(
    subject: _Subject, offset: float, noise_rng: np.random.Generator, size: int
) -> PhantomSlice:
    """Draw the head, then its lesion, then simulate the scanner."""
    signal: Plane = np.zeros((size, size), np.float32)
    anatomy_rng = np.random.default_rng(subject.anatomy_seed)
    draw_head = {"axial": _draw_axial, "coronal": _draw_coronal, "sagittal": _draw_sagittal}
    skull = draw_head[subject.orientation](signal, subject.tissues, offset, anatomy_rng)

    lesion_rng = np.random.default_rng(subject.lesion_seed)
    lesion = _draw_lesion(signal, subject, skull, offset, lesion_rng)

    pose_rng = np.random.default_rng(subject.pose_seed)
    columns, rows = _pose_maps(subject.orientation, size, pose_rng)
    # With replicated borders the neck extends out of the field of view, as in real slices.
    posed = cv2.remap(signal, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    labels = (skull.mask | lesion).astype(np.uint8) + lesion
    posed_labels = cv2.remap(labels, columns, rows, cv2.INTER_NEAREST)
    return PhantomSlice(
        image=_acquire(np.asarray(posed, np.float32), pose_rng, noise_rng),
        brain_mask=posed_labels > 0,
        lesion_mask=posed_labels > 1,
        orientation=subject.orientation,
    )


# --- Drawing -----------------------------------------------------------------------------------


def _to_pixels(points: Points, size: int) -> NDArray[np.int32]:
    """Vertices in OpenCV's fixed-point pixels."""
    pixels = (points + 1.0) * (0.5 * size) - 0.5
    vertices: NDArray[np.int32] = np.round(pixels * 2**_SUBPIXEL_BITS).astype(np.int32)
    return vertices


def _fill(plane: Plane | NDArray[np.uint8], points: Points, value: float) -> None:
    """Fill a closed curve; one without area (not visible in this slice) is skipped."""
    vertices = _to_pixels(points, plane.shape[0])
    if (vertices == vertices[0]).all():
        return  # OpenCV would paint a pixel
    cv2.fillPoly(plane, [vertices], value, lineType=cv2.LINE_8, shift=_SUBPIXEL_BITS)


def _stroke(plane: Plane | NDArray[np.uint8], points: Points, value: float, width: float) -> None:
    """Draw an open line; `width` is in head coordinates."""
    size = plane.shape[0]
    thickness = max(1, round(width * 0.5 * size))
    vertices = _to_pixels(points, size)
    cv2.polylines(plane, [vertices], False, value, thickness, cv2.LINE_8, _SUBPIXEL_BITS)


def _mask_of(points: Points, size: int) -> Mask:
    canvas = np.zeros((size, size), np.uint8)
    _fill(canvas, points, 1)
    return canvas > 0


def _wobble(rng: np.random.Generator, amplitude: float, first: int = 2, last: int = 6) -> Curve:
    """(V,) relative radii of an irregular closed curve: 1 plus harmonics `first` to `last`."""
    orders = np.arange(first, last + 1)
    phases = rng.uniform(0.0, 2.0 * np.pi, orders.size)
    weights = rng.normal(0.0, amplitude, orders.size) * first / orders
    waves = weights @ np.cos(np.outer(orders, _VERTEX_ANGLES) + phases[:, None])
    radii: Curve = 1.0 + np.clip(waves, -2.0 * amplitude, 2.0 * amplitude)
    return radii


def _ellipse(
    x: float,
    y: float,
    radius_x: float,
    radius_y: float,
    *,
    tilt: float = 0.0,
    radii: Curve | float = 1.0,
) -> Points:
    """Closed curve around (x, y), rotated by `tilt` radians; `radii` as returned by `_wobble`."""
    along = radii * radius_x * np.cos(_VERTEX_ANGLES)
    across = radii * radius_y * np.sin(_VERTEX_ANGLES)
    cos, sin = np.cos(tilt), np.sin(tilt)
    return np.stack([x + cos * along - sin * across, y + sin * along + cos * across], axis=1)


def _scaled(points: Points, factor: float) -> Points:
    centre = points.mean(axis=0)
    scaled: Points = centre + (points - centre) * factor
    return scaled


def _smooth_noise(rng: np.random.Generator, size: int, num_cells: int) -> Plane:
    """(H, W) noise of about unit variance with bumps of about `size / num_cells` pixels."""
    return _enlarge(rng.standard_normal((num_cells, num_cells), np.float32), size)


def _changing_noise(rng: np.random.Generator, size: int, num_cells: int, offset: float) -> Plane:
    """Smooth noise that changes from one field to another along the slice axis."""
    here = rng.standard_normal((num_cells, num_cells), np.float32)
    there = rng.standard_normal((num_cells, num_cells), np.float32)
    return _enlarge(np.cos(1.5 * offset) * here + np.sin(1.5 * offset) * there, size)


def _enlarge(coarse: Plane, size: int) -> Plane:
    return np.asarray(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), np.float32)


# --- Heads -------------------------------------------------------------------------------------


def _draw_axial(
    signal: Plane, tissues: _Tissues, offset: float, rng: np.random.Generator
) -> _Skull:
    size = signal.shape[0]
    level = rng.uniform(0.0, 0.9) + 0.3 * offset  # 0 through the orbits, 1 near the vertex
    basal = float(np.clip(1.5 - 3.0 * level, 0.0, 1.0))
    shrink = 1.0 - 0.12 * max(level, 0.0) ** 2
    outline = _ellipse(
        0.0,
        0.14 * basal,
        rng.uniform(0.56, 0.64) * shrink,
        rng.uniform(0.70, 0.78) * shrink * (1.0 - 0.20 * basal),
        radii=_wobble(rng, 0.012),
    )
    front = np.clip(-outline[:, 1], 0.0, 1.0)
    outline[:, 0] *= 1.0 - (0.08 + 0.2 * basal) * front
    face = _ellipse(0.0, -0.28, 0.56 * np.sqrt(basal), 0.58 * np.sqrt(basal))
    _fill(signal, face, tissues.fat)
    _fill(signal, _scaled(face, 0.92), tissues.muscle)
    _draw_scalp(signal, tissues, outline, rng)
    eye_size = 0.11 * np.sqrt(max(2.0 * basal - 1.0, 0.0))
    for side in (-1.0, 1.0):
        _draw_orbit(signal, tissues, (side * 0.24, -0.60), eye_size, rng)
    _fill(signal, _ellipse(0.0, -0.64, 0.09 * basal, 0.16 * basal), tissues.bone)
    _fill(signal, _ellipse(0.0, -0.64, 0.02 * basal, 0.16 * basal), tissues.muscle)

    mask = _mask_of(outline, size)
    _draw_parenchyma(signal, tissues, mask, offset, rng)
    openness = rng.uniform(0.5, 1.3) * np.clip(0.3 + level, 0.3, 1.0) * (1.0 - 0.3 * offset)
    _draw_fissure(signal, tissues, outline, rng)
    for side in (-1.0, 1.0):
        stretch = rng.uniform(0.8, 1.2)
        for y, tilt in ((-0.20, 0.45), (0.26, -0.5)):
            horn = _ellipse(
                side * 0.10,
                y * stretch,
                0.055 * openness,
                0.16 * openness,
                tilt=side * tilt,
                radii=_wobble(rng, 0.08),
            )
            _fill(signal, horn, tissues.fluid)
        _draw_choroid(signal, tissues, (side * 0.13, 0.24), rng)
    _draw_vessels(signal, tissues, outline, rng)
    return _Skull(outline, mask, (0.0, -0.10 + 0.12 * basal), (0.0, 2.0 * np.pi))


def _draw_coronal(
    signal: Plane, tissues: _Tissues, offset: float, rng: np.random.Generator
) -> _Skull:
    size = signal.shape[0]
    shrink = 1.0 - 0.15 * offset**2
    outline = _ellipse(
        0.0,
        -0.24,
        rng.uniform(0.55, 0.62) * shrink,
        rng.uniform(0.48, 0.55) * shrink,
        radii=_wobble(rng, 0.012),
    )
    jaw = rng.uniform(0.36, 0.50)
    face = np.array(
        [[-0.62, -0.1], [0.62, -0.1], [0.56, 0.4], [jaw, 1.1], [-jaw, 1.1], [-0.56, 0.4]]
    )
    _fill(signal, face, tissues.fat)
    _fill(signal, _scaled(face, 0.9), tissues.muscle)
    _draw_scalp(signal, tissues, outline, rng)
    _draw_soft_parts(signal, tissues, (-0.45, 0.45), (0.45, 0.95), rng)
    for side in (-1.0, 1.0):
        _fill(signal, _ellipse(side * 0.24, 0.52, 0.10, 0.12), tissues.bone)
        _draw_orbit(signal, tissues, (side * 0.3, 0.42), rng.choice((0.0, 0.11)), rng)
    _fill(signal, _ellipse(0.0, 0.55, 0.10, 0.16, radii=_wobble(rng, 0.1)), tissues.bone)

    lobes = [
        _ellipse(side * 0.34, 0.10, 0.23, 0.22, radii=_wobble(rng, 0.03)) for side in (-1.0, 1.0)
    ]
    middle = _ellipse(0.0, 0.14, 0.24, 0.20)
    for part in (*lobes, middle):
        _fill(signal, _scaled(part, 1.12), tissues.bone)
    mask = _mask_of(outline, size)
    for part in (*lobes, middle):
        mask |= _mask_of(part, size)
    _draw_parenchyma(signal, tissues, mask, offset, rng)

    openness = rng.uniform(0.5, 1.3) * (1.0 - 0.3 * offset)
    _draw_fissure(signal, tissues, outline, rng, reach=0.38)
    for side in (-1.0, 1.0):
        horn = _ellipse(
            side * 0.10,
            -0.24,
            0.055 * openness,
            0.13 * openness,
            tilt=side * 0.7,
            radii=_wobble(rng, 0.08),
        )
        _fill(signal, horn, tissues.fluid)
        sylvian = np.array([[side * 0.56, -0.06], [side * 0.42, -0.08], [side * 0.32, -0.02]])
        _stroke(signal, sylvian + rng.normal(0, 0.02, (3, 2)), tissues.fluid, 0.025)
        _draw_choroid(signal, tissues, (side * 0.11, -0.22), rng)
    _fill(signal, _ellipse(0.0, -0.06, 0.02 * openness, 0.10 * openness), tissues.fluid)
    _draw_vessels(signal, tissues, outline, rng)
    return _Skull(outline, mask, (0.0, 0.20), (np.pi, 2.0 * np.pi))


def _draw_sagittal(
    signal: Plane, tissues: _Tissues, offset: float, rng: np.random.Generator
) -> _Skull:
    size = signal.shape[0]
    lateral = float(np.clip(rng.uniform(0.0, 1.0) + 0.3 * offset, 0.0, 1.0))
    shrink = 1.0 - 0.1 * lateral**2
    outline = _ellipse(
        -0.06,
        -0.24,
        rng.uniform(0.66, 0.72) * shrink,
        rng.uniform(0.46, 0.52) * shrink,
        tilt=rng.uniform(-0.08, 0.02),
        radii=_wobble(rng, 0.015),
    )
    nose = rng.uniform(0.80, 0.95) - 0.15 * lateral
    face = np.array(
        [
            [0.66, -0.2],
            [0.72, 0.1],
            [nose, 0.34],
            [0.72, 0.45],
            [0.74, 0.7],
            [0.60, 0.85],
            [0.2, 0.9],
            [0.15, 1.1],
            [-0.5, 1.1],
            [-0.72, 0.1],
        ]
    )
    _fill(signal, face, tissues.fat)
    _fill(signal, _scaled(face, 0.92), tissues.muscle)
    _draw_scalp(signal, tissues, outline, rng)
    _draw_soft_parts(signal, tissues, (-0.4, 0.6), (0.45, 0.95), rng)
    _fill(signal, _ellipse(0.42, 0.38, 0.20, 0.07, radii=_wobble(rng, 0.1)), tissues.bone)
    _fill(signal, _ellipse(0.42, 0.60, 0.20, 0.11, radii=_wobble(rng, 0.06)), tissues.muscle)
    _fill(signal, _ellipse(0.14, 0.60, 0.05, 0.22), tissues.bone)
    _draw_orbit(signal, tissues, (0.58, 0.10), 0.13 * np.sqrt(lateral), rng)

    cerebellum = _ellipse(-0.36, 0.24, 0.27, 0.20, tilt=0.2, radii=_wobble(rng, 0.03))
    stem = np.array([[-0.12, 0.0], [0.08, 0.0], [0.04, 0.36], [-0.02, 0.56], [-0.14, 0.56]])
    for part in (cerebellum, stem):
        _fill(signal, _scaled(part, 1.14), tissues.bone)
    mask = _mask_of(outline, size) | _mask_of(cerebellum, size) | _mask_of(stem, size)
    _draw_parenchyma(signal, tissues, mask, offset, rng)

    openness = rng.uniform(0.5, 1.3) * (1.0 - 0.3 * offset)
    _stroke(signal, cerebellum[38:], tissues.fluid, 0.02)
    arc = _ellipse(-0.04, -0.16, 0.27, 0.15, tilt=-0.05)[38:70]
    _stroke(signal, arc, tissues.white, 0.07)
    _stroke(signal, arc + np.array([0.0, 0.06]), tissues.fluid, 0.07 * openness)
    _fill(signal, _ellipse(-0.14, 0.26, 0.03 * openness, 0.07), tissues.fluid)
    _draw_choroid(signal, tissues, (-0.16, -0.12), rng)
    _draw_vessels(signal, tissues, outline, rng)
    return _Skull(outline, mask, (0.17, 0.22), (np.pi * 0.95, np.pi * 1.95))


def _draw_scalp(
    signal: Plane, tissues: _Tissues, outline: Points, rng: np.random.Generator
) -> None:
    """Skin and fat, then bone with its marrow, up to the inner table."""
    bone_scale = rng.uniform(1.07, 1.12)
    scalp_scale = bone_scale + rng.uniform(0.06, 0.14)
    _fill(signal, _scaled(outline, scalp_scale), 0.6 * tissues.fat)
    _fill(signal, _scaled(outline, scalp_scale - 0.015), tissues.fat)
    _fill(signal, _scaled(outline, bone_scale), tissues.bone)
    if rng.random() < 0.4:
        marrow = _scaled(outline, rng.uniform(1.05, 1.06))
        _stroke(signal, marrow, 0.4 * tissues.fat, 0.015)
    _fill(signal, outline, tissues.fluid)


def _draw_parenchyma(
    signal: Plane, tissues: _Tissues, mask: Mask, offset: float, rng: np.random.Generator
) -> None:
    """White matter under a grey ribbon, with sulci that open to the subarachnoid space."""
    size = signal.shape[0]
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3) * (2.0 / size)
    folds = _changing_noise(rng, size, int(rng.integers(18, 26)), offset)
    patches = _changing_noise(rng, size, 7, offset)
    ribbon = np.clip((depth - 0.09 + 0.05 * folds) * 15.0, 0.0, 1.0)
    tissue = tissues.grey + (tissues.white - tissues.grey) * ribbon
    tissue *= 1.0 + 0.03 * patches

    # A sulcus follows the zero line of the noise and gets thinner with depth.
    sulcus_width = rng.uniform(0.1, 0.55) * np.clip(1.0 - depth * rng.uniform(3.0, 6.0), 0.0, 1.0)
    fluid = np.clip((sulcus_width - np.abs(folds)) * 8.0, 0.0, 1.0)
    fluid = np.maximum(fluid, np.clip((rng.uniform(0.005, 0.03) - depth) * 100.0, 0.0, 1.0))
    tissue += (tissues.fluid - tissue) * (fluid * rng.uniform(0.5, 1.0))
    np.copyto(signal, tissue, where=mask)


def _draw_fissure(
    signal: Plane,
    tissues: _Tissues,
    outline: Points,
    rng: np.random.Generator,
    reach: float = 0.95,
) -> None:
    """The midline: fluid along the falx, from the top down over the fraction `reach`."""
    top = outline[:, 1].min()
    bottom = top + reach * np.ptp(outline[:, 1])
    line = np.stack([rng.normal(0.0, 0.008, 8), np.linspace(top, bottom, 8)], axis=1)
    _stroke(signal, line, 0.6 * tissues.fluid + 0.4 * tissues.grey, rng.uniform(0.012, 0.03))
    if rng.random() < 0.5:
        _stroke(signal, line, tissues.vessel, 0.01)


def _draw_orbit(
    signal: Plane,
    tissues: _Tissues,
    centre: tuple[float, float],
    radius: float,
    rng: np.random.Generator,
) -> None:
    x, y = centre
    _fill(signal, _ellipse(x, y, 1.3 * radius, 1.4 * radius, radii=_wobble(rng, 0.05)), tissues.fat)
    _fill(signal, _ellipse(x, y - 0.1 * radius, radius, radius), 0.8 * tissues.fluid + 0.05)
    _fill(signal, _ellipse(x, y - 0.7 * radius, 0.4 * radius, 0.2 * radius), tissues.muscle)


def _draw_soft_parts(
    signal: Plane,
    tissues: _Tissues,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    rng: np.random.Generator,
) -> None:
    """Fat pads, muscles, mucosa and air of face and neck, at least as bright as lesions."""
    values = (tissues.fat, 0.8 * tissues.fat, tissues.bone, 0.6 * tissues.muscle)
    for _ in range(12):
        part = _ellipse(
            rng.uniform(*x_range),
            rng.uniform(*y_range),
            rng.uniform(0.03, 0.10),
            rng.uniform(0.03, 0.14),
            tilt=rng.uniform(-0.8, 0.8),
            radii=_wobble(rng, 0.12),
        )
        _fill(signal, part, values[int(rng.integers(len(values)))])


def _draw_choroid(
    signal: Plane, tissues: _Tissues, centre: tuple[float, float], rng: np.random.Generator
) -> None:
    """A small enhancing tuft in a ventricle, in about half of the heads."""
    radius = rng.uniform(0.015, 0.035) * (rng.random() < 0.5)
    x, y = np.asarray(centre) + rng.normal(0.0, 0.02, 2)
    _fill(signal, _ellipse(x, y, radius, 1.6 * radius), tissues.lesion)


def _draw_vessels(
    signal: Plane, tissues: _Tissues, outline: Points, rng: np.random.Generator
) -> None:
    """Vessels, and small bright foci as in ageing white matter."""
    centre = outline.mean(axis=0)
    for _ in range(6):
        vertex = outline[rng.integers(_NUM_VERTICES)]
        start = centre + rng.uniform(0.3, 0.95) * (vertex - centre)
        steps = rng.normal(0.0, 0.04, (4, 2)).cumsum(axis=0)
        _stroke(signal, start + steps * 0.8, tissues.vessel, 0.008)
    for _ in range(int(rng.integers(0, 6))):
        vertex = outline[rng.integers(_NUM_VERTICES)]
        x, y = centre + rng.uniform(0.1, 0.85) * (vertex - centre)
        radius = rng.uniform(0.01, 0.025)
        _fill(signal, _ellipse(x, y, radius, radius, radii=_wobble(rng, 0.15)), tissues.lesion)
    sinus_x, sinus_y = outline[np.argmin(outline[:, 1])] * 0.98
    _fill(signal, _ellipse(sinus_x, sinus_y, 0.03, 0.03), tissues.vessel)


# --- Lesions -----------------------------------------------------------------------------------


def _draw_lesion(
    signal: Plane, subject: _Subject, skull: _Skull, offset: float, rng: np.random.Generator
) -> Mask:
    """Paint the class's lesion into the signal and return its mask, empty for `notumor`."""
    extent = float(np.sqrt(1.0 - 0.8 * offset**2))  # radius of an off-centre slice of a ball
    if subject.class_name == "glioma":
        return _draw_glioma(signal, subject.tissues, skull, extent, offset, rng)
    if subject.class_name == "meningioma":
        return _draw_meningioma(signal, subject.tissues, skull, extent, rng)
    if subject.class_name == "pituitary":
        return _draw_pituitary(signal, subject.tissues, skull, extent, rng)
    return np.zeros(signal.shape, np.bool_)


def _draw_glioma(
    signal: Plane,
    tissues: _Tissues,
    skull: _Skull,
    extent: float,
    offset: float,
    rng: np.random.Generator,
) -> Mask:
    """In the brain, off the midline: a ragged, uneven ring around a necrotic core, in oedema."""
    size = signal.shape[0]
    centre = skull.outline.mean(axis=0)
    angle = rng.uniform(-0.7, 0.7) + np.pi * rng.integers(2)
    reach = rng.uniform(0.40, 0.55)
    vertex = skull.outline[int(angle / (2.0 * np.pi) * _NUM_VERTICES) % _NUM_VERTICES]
    x, y = centre + reach * (vertex - centre)
    room = cv2.pointPolygonTest(skull.outline.astype(np.float32), (float(x), float(y)), True)
    radius = min(rng.uniform(0.13, 0.22), 0.72 * room) * extent

    ragged = _wobble(rng, 0.10, 2, 9)
    tumour_outline = _ellipse(x, y, radius, radius * rng.uniform(0.8, 1.1), radii=ragged)
    tumour = _mask_of(tumour_outline, size) & skull.mask

    swelling = _mask_of(_ellipse(x, y, 1.9 * radius, 1.6 * radius, radii=_wobble(rng, 0.14)), size)
    softness = 0.02 * size
    weight = cv2.GaussianBlur((swelling & skull.mask).astype(np.float32), (0, 0), softness)
    weight = weight * skull.mask * rng.uniform(0.5, 0.95)
    signal += (tissues.oedema - signal) * weight

    core = _scaled(tumour_outline, rng.uniform(0.45, 0.75)) + rng.normal(0.0, 0.08 * radius, 2)
    patches = 1.0 + 0.18 * _changing_noise(rng, size, 28, offset)
    np.copyto(signal, tissues.lesion * patches, where=tumour)
    if rng.random() < 0.85:
        necrotic = _mask_of(core, size) & tumour
        np.copyto(signal, tissues.necrosis * patches, where=necrotic)
    return tumour


def _draw_meningioma(
    signal: Plane, tissues: _Tissues, skull: _Skull, extent: float, rng: np.random.Generator
) -> Mask:
    """On the dura: round, uniform, bright, with a sharp border, a fluid cleft and a dural tail."""
    size = signal.shape[0]
    centre = skull.outline.mean(axis=0)
    position = int(rng.uniform(*skull.vault) / (2.0 * np.pi) * _NUM_VERTICES) % _NUM_VERTICES
    vertex = skull.outline[position]
    inwards = (centre - vertex) / np.linalg.norm(centre - vertex)
    radius = rng.uniform(0.15, 0.25) * extent
    x, y = vertex + inwards * radius * rng.uniform(0.55, 0.85)
    ball = _ellipse(x, y, radius, radius * rng.uniform(0.85, 1.1), radii=_wobble(rng, 0.02))

    cleft = _mask_of(_scaled(ball, 1.08), size) & skull.mask
    np.copyto(signal, np.float32(tissues.fluid), where=cleft)
    tail = skull.outline[(position + np.arange(-8, 9)) % _NUM_VERTICES]
    _stroke(signal, tail, tissues.lesion, 0.02)
    tumour = _mask_of(ball, size) & skull.mask
    np.copyto(signal, np.float32(tissues.lesion), where=tumour)
    return tumour


def _draw_pituitary(
    signal: Plane, tissues: _Tissues, skull: _Skull, extent: float, rng: np.random.Generator
) -> Mask:
    """In the sella: a uniform bright ovoid, often with a waist where it grows out of the sella."""
    size = signal.shape[0]
    x, y = np.asarray(skull.sella) + rng.normal(0.0, 0.02, 2)
    radius = rng.uniform(0.10, 0.15) * extent
    body = _ellipse(x, y, radius, radius * rng.uniform(0.8, 1.1), radii=_wobble(rng, 0.04))
    growth = radius * rng.uniform(0.5, 0.9)
    upper = _ellipse(x, y - radius, growth, growth, radii=_wobble(rng, 0.04))
    cistern = _mask_of(_ellipse(x, y, 1.5 * radius, 1.3 * radius), size) & skull.mask
    np.copyto(signal, np.float32(tissues.fluid), where=cistern)
    tumour = _mask_of(body, size)
    if rng.random() < 0.5:
        tumour |= _mask_of(upper, size)
    np.copyto(signal, np.float32(tissues.lesion), where=tumour)
    return tumour


# --- Pose and scanner --------------------------------------------------------------------------


def _pose_maps(orientation: str, size: int, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Source column and row of each output pixel: mirror, rotate, scale, shift, bend."""
    mirror = -1.0 if orientation == "sagittal" and rng.random() < 0.5 else 1.0
    turn = np.deg2rad(rng.normal(0.0, 7.0))
    scale_x, scale_y = rng.uniform(0.84, 1.06) * rng.uniform(0.95, 1.05, 2)
    shift_x, shift_y = rng.normal(0.0, 0.05, 2)
    bend_x = 0.02 * _smooth_noise(rng, size, 5)
    bend_y = 0.02 * _smooth_noise(rng, size, 5)

    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0
    x, y = (axis - shift_x)[None, :], (axis - shift_y)[:, None]
    source_x = mirror * (np.cos(turn) * x + np.sin(turn) * y) / scale_x + bend_x
    source_y = (np.cos(turn) * y - np.sin(turn) * x) / scale_y + bend_y
    to_pixels = 0.5 * size
    columns = ((source_x + 1.0) * to_pixels - 0.5).astype(np.float32)
    rows = ((source_y + 1.0) * to_pixels - 0.5).astype(np.float32)
    return columns, rows


def _acquire(
    signal: Plane, subject_rng: np.random.Generator, noise_rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Apply the blur, coil shading, gain and gamma of the subject's scan, and new noise."""
    size = signal.shape[0]
    blur_px = subject_rng.uniform(0.6, 1.1) * size / 224
    shading = np.exp(0.14 * _smooth_noise(subject_rng, size, 3))
    below = np.linspace(-1.0, 1.0, size, dtype=np.float32)[:, None] - subject_rng.uniform(0.5, 1.0)
    shading *= np.exp(-4.0 * np.clip(below, 0.0, None))  # the head coil ends above the neck
    gain = subject_rng.uniform(0.5, 1.0)
    gamma = subject_rng.uniform(0.8, 1.3)
    noise_level = subject_rng.uniform(0.005, 0.02)

    image = cv2.GaussianBlur(signal, (0, 0), blur_px) * shading
    image = cv2.pow(np.clip(image, 0.0, None), gamma) * gain
    image += noise_level * noise_rng.standard_normal(image.shape, np.float32)
    # A magnitude image has no negative values: noise in air is folded upwards.
    grey_values: NDArray[np.uint8] = np.clip(np.abs(image) * 255.0, 0.0, 255.0).astype(np.uint8)
    return grey_values
