"""Data for benchmarks: slices from a folder, else phantoms; random embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.errors import DataError
from brainray.mri.phantom import CLASSES, make_slice
from brainray.mri.resize import thumbnail

File = TypeVar("File")

SALT = b"plain images name no subjects"

_NUM_PHANTOMS = 200
_SEPARATION = 0.4  # spread of the centres per feature, in units of the noise
_SUFFIXES = {".jpg", ".jpeg", ".png"}


def load_slices(source: Path | None, seed: int, limit: int = 2000) -> list[NDArray[np.uint8]]:
    """Greyscale slices (H, W) in random order: at most ``limit`` from the folder, or phantoms.

    Raises:
        DataError: the folder contains no JPEG or PNG.
    """
    rng = np.random.default_rng(seed)
    if source is None:
        return [
            make_slice(CLASSES[number % len(CLASSES)], rng).image for number in range(_NUM_PHANTOMS)
        ]
    files = _pictures(source)
    if not files:
        raise DataError(f"{source} contains no JPEG or PNG: give a folder of slices")
    chosen = rng.permutation(len(files))[:limit]
    images = [cv2.imread(str(files[row]), cv2.IMREAD_GRAYSCALE) for row in chosen]
    return [np.asarray(image, dtype=np.uint8) for image in images if image is not None]


@dataclass(frozen=True)
class Pictures:
    """Slices in folders of classes."""

    thumbnails: NDArray[np.uint8]  # (N, S * S)
    paths: list[str]
    classes: NDArray[np.str_]  # (N,): the folder that each lies in


def pictures_by_class(source: Path | None) -> Pictures:
    """A folder's JPEG and PNG files."""
    files = [] if source is None else _pictures(source)
    read = ((path, cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)) for path in files)
    found = [(thumbnail(np.asarray(image)), path) for path, image in read if image is not None]
    return Pictures(
        np.array([image.ravel() for image, _ in found], np.uint8),
        [str(path) for _, path in found],
        np.array([path.parent.name for _, path in found], np.str_),
    )


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def spread(files: Sequence[File], count: int) -> list[File]:
    """At most ``count`` files, evenly spaced, so that sorted ones keep the share of every class."""
    places = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
    return [files[place] for place in places]


def perturbed(image: NDArray[np.uint8], side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The slice at (side, side), rotated, shifted and shaded too much to count as a copy."""
    enlarged = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)
    turn = cv2.getRotationMatrix2D(
        (side / 2, side / 2), rng.uniform(-15.0, 15.0), rng.uniform(0.85, 1.1)
    )
    turn[:, 2] += rng.uniform(-0.06, 0.06, 2) * side
    warped = cv2.warpAffine(enlarged, turn, (side, side)).astype(np.float32)
    noise = rng.standard_normal((side // 8, side // 8)).astype(np.float32)
    shading = 1 + 0.15 * cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(warped * shading, 0, 255).astype(np.uint8)


def embedding_like(
    num_rows: int, num_features: int, num_components: int, seed: int
) -> NDArray[np.float32]:
    """(num_rows, num_features) rows of overlapping Gaussian clusters, unequal in size."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(0.0, _SEPARATION, (num_components, num_features)).astype(np.float32)
    shares = rng.dirichlet(np.full(num_components, 3.0))
    rows = rng.standard_normal((num_rows, num_features), dtype=np.float32)
    rows += centers[rng.choice(num_components, num_rows, p=shares)]
    return rows
