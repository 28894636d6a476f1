"""Near-duplicate search: recall, precision and cost.

The ground truth consists of copies made here, altered as copies of medical images usually are, and
of neighbours: adjacent slices of phantom series, or real slices whose 32 x 32 thumbnails correlate
like those of neighbours (METHOD, "Data"). Some of the latter are copies with a different contrast
or frame, which only the rule under test can recognise; the plot shows those classified as copies.
"""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torchvision.utils import make_grid

from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.benchmarks.samples import load_slices
from brainray.config import NearDuplicateConfig
from brainray.errors import DataError
from brainray.log import log
from brainray.mri.duplicates import (
    COPY,
    KINDS,
    MIRRORED,
    ROTATED,
    find_twins,
    near_duplicate_pairs,
    pair_similarity,
)
from brainray.mri.groups import connected_groups
from brainray.mri.phantom import CLASSES, make_series
from brainray.mri.reframe import find_twins_by_head
from brainray.mri.resize import crop_foreground, thumbnail
from brainray.mri.skull_strip import otsu_mask
from brainray.mri.thumbnails import coarse, standardise
from brainray.report.style import new_figure
from brainray.schema import THUMBNAIL_SIDE

Image = NDArray[np.uint8]  # (H, W)
Perturbation = Callable[[Image, np.random.Generator], Image]

JPEG_QUALITY = 50
MAX_BRIGHTNESS = 0.2
MAX_BORDER = 0.05
MAX_CROP = 0.04

_NEIGHBOUR_CORRELATION = (0.95, 0.975)  # of real thumbnails; above it, some are true copies
_SERIES_LENGTH = 6
_SHOWN_PAIRS, _SHOWN_PER_ROW, _SHOWN_SIDE = 12, 4, 128
_FAMILY_SIZE = 4  # similar slices among the synthesised ones
_HEAD_BEND, _NEIGHBOUR_BEND = 4.0, 1.2  # pixels of 96


def run(options: CaseOptions) -> BenchmarkResult:
    """Recall per perturbation, precision against neighbours, and cost by number of slices.

    Raises:
        DataError: ``--source`` contains too few slices.
    """
    rng = np.random.default_rng(options.seed)
    settings = NearDuplicateConfig()
    num_slices, num_copied = (600, 60) if options.quick else (2400, 200)
    images, neighbours = (
        _phantoms(num_slices, rng)
        if options.source is None
        else _real(options.source, num_slices, options.seed)
    )
    fingerprints = np.stack([fingerprint(image) for image in images])
    log(f"{len(images)} slices, {len(neighbours)} neighbouring pairs")
    own_pairs = near_duplicate_pairs(fingerprints, settings)
    names = [f"{number:06d}" for number in range(len(images))]
    groups = np.array(connected_groups(names, own_pairs.first, own_pairs.second))
    chosen = rng.choice(len(images), min(num_copied, len(images)), replace=False)

    def is_found(reference: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (reference >= 0) & (groups[reference] == groups[chosen])

    recalls: dict[str, float] = {}
    reframings: dict[str, tuple[float, float]] = {}
    copies: dict[str, NDArray[np.uint8]] = {}
    for name, (perturb, kind) in PERTURBATIONS.items():
        copies[name] = np.stack([fingerprint(perturb(images[number], rng)) for number in chosen])
        twins = find_twins(copies[name], fingerprints, settings)
        # The match may be another copy that is itself mirrored or rotated; ignore its kind.
        is_of_kind = (twins.kind == kind) | (twins.reference != chosen)
        recalls[name] = float(np.mean(is_found(twins.reference) & is_of_kind))
        log(f"{name}: recall {recalls[name]:.3f}")

    for name, perturb in FRAMINGS.items():
        framed = np.stack([fingerprint(perturb(images[number], rng)) for number in chosen])
        once, twice = (
            float(np.mean(is_found(reference)))
            for reference in _twins_by_frame_and_head(framed, fingerprints, settings)
        )
        reframings[name] = twice, once
        log(f"{name}: recall {once:.3f} by whole frames, {twice:.3f} with heads as well")

    neighbour_similarities = pair_similarity(
        fingerprints[neighbours[:, 0]], fingerprints[neighbours[:, 1]]
    )
    upright = [name for name, (_, kind) in PERTURBATIONS.items() if kind == COPY]
    copy_similarities = np.concatenate(
        [pair_similarity(copies[name], fingerprints[chosen]) for name in upright]
    )
    curve = _curve(copy_similarities, neighbour_similarities)
    accepted_copies = float(np.sum(copy_similarities >= settings.similarity))
    known = options.source is None  # all neighbours are known not to be copies
    taken = neighbours[neighbour_similarities >= settings.similarity].tolist()
    # Precision depends on the mix; it is computed for as many neighbours as copies.
    false_share = float(np.mean(neighbour_similarities >= settings.similarity))
    precision = accepted_copies / max(accepted_copies + false_share * len(copy_similarities), 1.0)

    sizes = (5_000, 50_000) if options.quick else (5_000, 50_000, 500_000)
    seconds = {}
    for size in sizes:
        synthesised = synthesise(fingerprints, size, rng)
        start = time.perf_counter()
        found = near_duplicate_pairs(synthesised, settings)
        seconds[size] = time.perf_counter() - start
        log(f"{size} fingerprints: {seconds[size]:.1f} s, {len(found)} pairs")
    measures = [
        *(
            Measure(f"recall/{name}", value, at_least=0.9 if "combined" in name else 0.95)
            for name, value in recalls.items()
        ),
        *(
            Measure(f"from elsewhere/{name} (by whole frames {once:.2f})", twice)
            for name, (twice, once) in reframings.items()
        ),
        Measure("neighbours kept apart", 1.0 - false_share, at_least=0.99 if known else None),
        Measure("precision", precision, at_least=0.99 if known else None),
        *(
            Measure(f"time per fingerprint at {size}", 1e3 * value / size, unit="ms")
            for size, value in seconds.items()
        ),
        Measure(
            f"growth of time per fingerprint, {sizes[0]} to {sizes[-1]}",
            (seconds[sizes[-1]] / sizes[-1]) / (seconds[sizes[0]] / sizes[0]),
            unit="x",
            at_most=2.0,
        ),
    ]
    details = {
        "settings": settings.model_dump(),
        "source": "phantoms" if options.source is None else "real slices",
        "num_slices": len(images),
        "num_neighbouring_pairs": len(neighbours),
        "num_copies_per_perturbation": len(chosen),
        "num_links_by_kind": {
            name: len(own_pairs.filter_by_kind(code)) for code, name in enumerate(KINDS)
        },
        "curve": curve,
        "seconds": {str(size): value for size, value in seconds.items()},
    }
    shown = [np.hstack([_square(images[row]) for row in pair]) for pair in taken[:_SHOWN_PAIRS]]
    return BenchmarkResult(measures, details, _figure(curve, settings.similarity, shown))


def _twins_by_frame_and_head(
    queries: NDArray[np.uint8],
    references: NDArray[np.uint8],
    settings: NearDuplicateConfig,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(Q,) references found by whole frames, and with a second comparison of heads only."""
    once = find_twins(queries, references, settings)
    rows = np.flatnonzero(~once.is_upright)
    twice = once.completed_by(rows, find_twins_by_head(queries[rows], references, settings))
    return once.reference, twice.reference


def fingerprint(image: Image) -> NDArray[np.uint8]:
    """(9216,) the area-averaged frame, as in preprocessing."""
    return thumbnail(image).ravel()


def synthesise(
    fingerprints: NDArray[np.uint8], count: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """(count, 9216) head-like slices in families of one head, two neighbours and one copy.

    A head is a warped mixture of two fingerprints; neighbours are warped a little more. So a slice
    has as many candidates as a real one, and larger data means more heads.
    """
    shape = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    result = np.empty((count, fingerprints.shape[1]), np.uint8)
    for start in range(0, count, _FAMILY_SIZE):
        first, second = rng.integers(len(fingerprints), size=2)
        share = rng.uniform(0.3, 0.7)
        mixture = share * fingerprints[first] + (1 - share) * fingerprints[second]
        head = _bent(mixture.reshape(shape).astype(np.float32), _HEAD_BEND, rng)
        neighbours = [_bent(head, _NEIGHBOUR_BEND, rng) for _ in range(_FAMILY_SIZE - 2)]
        copy = reencode(change_contrast(_clip(head), rng), rng)
        family = np.stack([_clip(head), *map(_clip, neighbours), copy])
        result[start : start + _FAMILY_SIZE] = family.reshape(_FAMILY_SIZE, -1)[: count - start]
    return result


def _bent(picture: NDArray[np.float32], pixels: float, rng: np.random.Generator) -> Any:
    """(S, S) warped by a smooth random displacement with the given standard deviation."""
    side = len(picture)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).astype(np.float32)
    field = rng.normal(0, pixels, (4, 4, 2)).astype(np.float32)
    bend = cv2.resize(field, (side, side), interpolation=cv2.INTER_CUBIC)
    return cv2.remap(picture, grid + bend, None, cv2.INTER_LINEAR)


def reencode(image: Image, rng: np.random.Generator) -> Image:
    """Encode as JPEG and decode again."""
    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE))


def rescale(image: Image, rng: np.random.Generator) -> Image:
    """Resize by a factor of 0.5 to 2."""
    factor = 2.0 ** rng.uniform(-1, 1)
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size, interpolation=interpolation))


def three_channels(image: Image, rng: np.random.Generator) -> Image:
    """Store in colour and read as grey again."""
    _, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_GRAY2BGR))
    with PIL.Image.open(io.BytesIO(encoded.tobytes())) as picture:
        return np.asarray(picture.convert("L"))


def brighten(image: Image, rng: np.random.Generator) -> Image:
    """Make lighter or darker by up to 20 % of the range, clipped at black and white."""
    return _clip(image + 255.0 * rng.uniform(-MAX_BRIGHTNESS, MAX_BRIGHTNESS))


def change_contrast(image: Image, rng: np.random.Generator) -> Image:
    """Scale deviations from the mean by up to 20 % up or down, clipped at black and white."""
    mean = image.mean()
    return _clip((image - mean) * (1.0 + rng.uniform(-MAX_BRIGHTNESS, MAX_BRIGHTNESS)) + mean)


def frame(image: Image, rng: np.random.Generator) -> Image:
    """Add a white, grey or black border of up to 5 % on one or all sides, around or over it."""
    height, width = image.shape
    colour = int(rng.choice([0, 128, 255]))
    sides = np.ones(4) if rng.random() < 0.5 else np.eye(4)[rng.integers(4)]
    share = rng.uniform(0.02, MAX_BORDER)
    lengths = np.array([height, height, width, width])
    top, bottom, left, right = np.rint(sides * share * lengths).astype(int).tolist()
    if rng.random() < 0.5:
        return np.pad(image, ((top, bottom), (left, right)), constant_values=colour)
    framed = np.full_like(image, colour)
    inside = np.s_[top : height - bottom, left : width - right]
    framed[inside] = image[inside]
    return framed


def caption(image: Image, rng: np.random.Generator) -> Image:
    """Add a strip with text, 5 % of the height, at the top or bottom, next to or over the image."""
    height, width = image.shape
    thickness = max(6, round(MAX_BORDER * height))
    paper = int(rng.choice([0, 255]))
    strip = np.full((thickness, width), paper, np.uint8)
    text, left = f"SE {rng.integers(100)} IM {rng.integers(100)} T1", int(rng.integers(width // 4))
    origin, scale = (left, thickness - 3), thickness / 30
    cv2.putText(strip, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, 255 - paper, 1)
    above = rng.random() < 0.5
    if rng.random() < 0.5:
        return np.concatenate([strip, image] if above else [image, strip])
    captioned = image.copy()
    captioned[: thickness if above else None][-thickness:] = strip
    return captioned


def crop(image: Image, rng: np.random.Generator) -> Image:
    """Crop up to 4 % at every side."""
    height, width = image.shape
    top, bottom, left, right = rng.uniform(0, MAX_CROP, 4)
    return image[
        round(top * height) : height - round(bottom * height),
        round(left * width) : width - round(right * width),
    ]


def combine(image: Image, rng: np.random.Generator) -> Image:
    """Apply a random subset of the alterations, in the order in which they usually happen."""
    if rng.random() < 0.5:
        image = crop(image, rng)
    if rng.random() < 0.5:
        image = brighten(image, rng)
    if rng.random() < 0.5:
        image = change_contrast(image, rng)
    if rng.random() < 0.5:
        image = frame(image, rng) if rng.random() < 0.5 else caption(image, rng)
    if rng.random() < 0.5:
        image = rescale(image, rng)
    return reencode(image, rng)


def mirror(image: Image, rng: np.random.Generator) -> Image:
    """Mirror horizontally or vertically, then encode as JPEG."""
    return reencode(np.ascontiguousarray(np.flip(image, axis=int(rng.integers(2)))), rng)


def rotate(image: Image, rng: np.random.Generator) -> Image:
    """Rotate by 90, 180 or 270 degrees, then encode as JPEG."""
    return reencode(np.ascontiguousarray(np.rot90(image, int(rng.integers(1, 4)))), rng)


PERTURBATIONS: dict[str, tuple[Perturbation, int]] = {
    "jpeg": (reencode, COPY),
    "resized": (rescale, COPY),
    "three channels": (three_channels, COPY),
    "brightness": (brighten, COPY),
    "contrast": (change_contrast, COPY),
    "border": (frame, COPY),
    "caption": (caption, COPY),
    "crop": (crop, COPY),
    "combined": (combine, COPY),
    "mirrored": (mirror, MIRRORED),
    "rotated": (rotate, ROTATED),
    "mirrored, combined": (lambda image, rng: mirror(combine(image, rng), rng), MIRRORED),
    "rotated, crop": (lambda image, rng: rotate(crop(image, rng), rng), ROTATED),
}
"""Alterations of a slice, with the kind of copy that each produces."""


def _padded(share: float, colour: int = 0, *, sides_only: bool = False) -> Perturbation:
    """Add a border with the given share of the height, or only at the left and right."""

    def pad(image: Image, rng: np.random.Generator) -> Image:
        width = round(share * image.shape[0])
        vertical = (0, 0) if sides_only else (width, width)
        return np.pad(image, (vertical, (width, width)), constant_values=colour)

    return pad


def _cut_to_head(image: Image, rng: np.random.Generator) -> Image:
    return crop_foreground(image, otsu_mask(image))


def _darkened(image: Image, rng: np.random.Generator) -> Image:
    return _clip(image * 0.2)


FRAMINGS: dict[str, Perturbation] = {
    "white border of 12 %": _padded(0.12, 255),
    "black border of 12 %": _padded(0.12),
    "black border of 25 %": _padded(0.25),
    "18 % black left and right": _padded(0.18, sides_only=True),
    "cut to the head": _cut_to_head,
    "a fifth as bright": _darkened,
}
"""Alterations found in other collections, too large for a comparison of whole frames."""


def _clip(values: NDArray[np.floating]) -> Image:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _phantoms(count: int, rng: np.random.Generator) -> tuple[list[Image], NDArray[np.int64]]:
    """Series of phantoms and the pairs (P, 2) of adjacent slices."""
    images: list[Image] = []
    neighbours = []
    for number in range(count // _SERIES_LENGTH):
        series = make_series(CLASSES[number % len(CLASSES)], rng, num_slices=_SERIES_LENGTH)
        first = len(images)
        neighbours += [(row, row + 1) for row in range(first, first + _SERIES_LENGTH - 1)]
        images += [phantom.image for phantom in series]
    return images, np.array(neighbours, dtype=np.int64)


def _real(source: Path, count: int, seed: int) -> tuple[list[Image], NDArray[np.int64]]:
    """Random slices of a folder and the pairs (P, 2) that look like neighbours."""
    images = load_slices(source, seed, limit=count)
    if len(images) < 2:
        raise DataError(
            f"{source} contains {len(images)} images: the benchmark needs a few hundred"
        )
    standard = standardise(coarse(np.stack([fingerprint(image) for image in images])))
    correlation = np.triu(standard @ standard.T, k=1)
    low, high = _NEIGHBOUR_CORRELATION
    return images, np.argwhere((correlation >= low) & (correlation < high))


def _curve(
    copy_similarities: NDArray[np.float32], neighbour_similarities: NDArray[np.float32]
) -> dict[str, list[float]]:
    """Precision and recall by threshold, with as many neighbours as copies."""
    thresholds = 1.0 - np.geomspace(1e-4, 0.2, 41)
    recall = np.array([np.mean(copy_similarities >= threshold) for threshold in thresholds])
    wrong = np.array([np.mean(neighbour_similarities >= threshold) for threshold in thresholds])
    found = recall + wrong
    precision = np.divide(recall, found, out=np.ones_like(recall), where=found > 0)
    return {
        "threshold": thresholds.tolist(),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
    }


def _square(image: Image) -> Image:
    return np.asarray(cv2.resize(image, (_SHOWN_SIDE, _SHOWN_SIDE), interpolation=cv2.INTER_AREA))


def _contact_sheet(pictures: list[Image]) -> Image:
    tiles = torch.from_numpy(np.stack(pictures))[:, None]
    return make_grid(tiles, nrow=_SHOWN_PER_ROW, padding=0)[0].numpy()


def _figure(curve: dict[str, list[float]], threshold: float, taken: list[Image]) -> Figure:
    """The precision and recall curves, and neighbours that were classified as copies."""
    figure = new_figure(7.0, 3.6 + (2.4 if taken else 0.0))
    axes, *below = figure.subplots(1 + bool(taken), 1, squeeze=False)[:, 0]
    for pictures in below:
        pictures.imshow(_contact_sheet(taken), cmap="gray", vmin=0, vmax=255)
        pictures.set_title("neighbours classified as copies", fontsize=9)
        pictures.set_axis_off()
    residual = 1.0 - np.array(curve["threshold"])
    axes.plot(residual, curve["precision"], label="precision")
    axes.plot(residual, curve["recall"], label="recall")
    axes.axvline(1.0 - threshold, color="grey", linestyle="--", label="threshold in use")
    axes.set(xscale="log", xlabel="1 - minimum similarity", ylim=(0.0, 1.02))
    axes.legend()
    return figure
