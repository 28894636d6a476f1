"""What every format yields, a grayscale slice or the reason why not, and what they share."""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Literal, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Values: TypeAlias = NDArray[np.floating]

Orientation = Literal["axial", "coronal", "sagittal"]
ORIENTATIONS: tuple[Orientation, ...] = ("axial", "coronal", "sagittal")

MAX_INFINITE_SHARE = 0.01
MAX_NAN_SHARE = 0.95
# As an identity, each would join all patients.
_NOBODY = frozenset(
    {
        *("anon", "anonymous", "anonymouspatient", "anonymized", "anonymised"),
        *("none", "null", "na", "nan", "unknown", "unspecified", "notavailable", "notapplicable"),
        *("removed", "redacted", "deleted", "deidentified", "deid", "patient", "patientid"),
    }
)
MAX_ASPECT_RATIO = 10.0  # sides of a slice on screen; heads stay below 2, panoramas below 8
SQUARE_PIXEL_TOLERANCE = 1.03  # ratio of two spacings that still counts as square

_SUBJECT_ID_DIGITS = 32


class RejectedImage(Exception):
    """A file that is left out: ``reason`` is a fixed phrase to count, ``detail`` free text.

    Neither ever quotes what the file says: headers hold names, dates and identifiers.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both, so that it can be pickled
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class DecodeOptions:
    """Limits of what is decoded, and how volumes become slices."""

    min_side: int
    """Slices with a shorter height or width, in pixels, are rejected."""
    max_pixels: int
    """Of one slice, checked on the header."""
    max_voxels: int
    """Of all frames or volumes of a file together, checked on the header."""
    axis: Orientation
    """The plane in which NIfTI volumes are sliced."""
    window_percentiles: tuple[float, float]
    """Foreground percentiles that become 0 and 255 where the file states no window."""
    min_foreground: float
    """Slices of a NIfTI volume with a smaller share of foreground are skipped as empty."""
    salt: bytes
    """Secret key of the subject hashes: without one, short patient numbers could be guessed."""

    def __post_init__(self) -> None:
        if not self.salt:
            raise ValueError("salt must not be empty: patient numbers are easily guessed")


@dataclass(frozen=True)
class DecodedSlice:
    """A grayscale slice as it is shown on screen."""

    image: NDArray[np.uint8]  # (H, W)
    format: str  # JPEG, PNG, TIFF, BMP, GIF, DICOM or NIfTI
    frame: str = ""
    """Which slice of its file, counted from 0, such as ``frame=3``; empty where it has one."""
    subject_id: str | None = None
    """Keyed hash of the patient or the volume; None where the file tells of neither."""


def check_size(height: int, width: int, *, min_side: int, max_pixels: int) -> None:
    """Refuse a slice that is too small, too large or no slice by its shape.

    Raises:
        RejectedImage: with the reason.
    """
    if height * width > max_pixels:
        raise RejectedImage("too large", f"{width} x {height} pixels, limit {max_pixels}")
    if min(height, width) < max(min_side, 1):
        raise RejectedImage("too small", f"{width} x {height} pixels, shortest side {min_side}")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise RejectedImage("too elongated", f"{width} x {height} pixels")


def check_num_voxels(num_voxels: int, max_voxels: int) -> None:
    """Refuse a file of many slices before it is decoded.

    Raises:
        RejectedImage: it announces more voxels than the limit.
    """
    if num_voxels > max_voxels:
        raise RejectedImage("too large", f"{num_voxels} voxels, limit {max_voxels}")


STUDY_PREFIX = "study-"
"""Begins the subject of slices whose header names a study and no patient."""


def names_nobody(identity: str) -> bool:
    """Whether it is a word that de-identification and tables write where nobody is named."""
    word = "".join(letter for letter in identity.casefold() if letter.isalnum())
    return not word or word in _NOBODY or word == len(word) * "x" != "x"


def subject_hash(kind: str, identity: str, salt: bytes) -> str:
    """HMAC-SHA256 of an identity, 32 hex digits; equal strings of two kinds differ.

    Raises nothing and keeps nothing: with the salt secret, the identity cannot be guessed back.
    """
    digest = hmac.new(salt, f"{kind}\0{identity}".encode(), hashlib.sha256)
    return digest.hexdigest()[:_SUBJECT_ID_DIGITS]


def volume_hash(content: bytes, salt: bytes) -> str:
    """The subject of a file that is one volume and names no patient: its content."""
    return subject_hash("volume", hashlib.sha256(content).hexdigest(), salt)


def replace_non_finite(values: Values) -> Values:
    """NaN and infinities become the smallest finite value, in place.

    NaN stands for no data, as around a brain that was cut out: up to 95 % may be so. Of infinities,
    which are errors, 1 %.

    Raises:
        RejectedImage: more of them.
    """
    finite = np.isfinite(values)
    if finite.all():
        return values
    nan, infinite = np.isnan(values).mean(), np.isinf(values).mean()
    if nan > MAX_NAN_SHARE or infinite > MAX_INFINITE_SHARE:
        raise RejectedImage(
            "non-finite pixels", f"{nan:.1%} NaN, {infinite:.1%} infinite of {values.size}"
        )
    values[~finite] = values[finite].min()
    return values


def foreground_threshold(values: Values) -> float:
    """The value above which a voxel belongs to the head rather than to the air around it.

    A tenth of the way from the 2nd to the 98th percentile, which a few hot or dead voxels do not
    move: Smith, "Fast robust automated brain extraction", 2002, section "Intensity estimation".
    """
    low, high = np.percentile(values, (2.0, 98.0))
    return float(low + 0.1 * (high - low))


def foreground_window(values: Values, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Two percentiles of the foreground, or the whole range where they coincide."""
    foreground = values[values > foreground_threshold(values)]
    if foreground.size:
        low, high = np.percentile(foreground, percentiles)
        if high > low:
            return float(low), float(high)
    return float(values.min()), float(values.max())


def to_uint8(values: Values, low: float, high: float) -> NDArray[np.uint8]:
    """Map ``low``..``high`` linearly to 0..255 and clip; all 0 where there is no range."""
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    # Before the subtraction: float32 values far outside could overflow.
    scaled = (np.clip(values, low, high) - low) * (255.0 / (high - low))
    return np.clip(scaled, 0.0, 255.0).round().astype(np.uint8)


def to_square_pixels(
    image: NDArray[np.uint8], spacing: tuple[float, float], options: DecodeOptions
) -> NDArray[np.uint8]:
    """Enlarge the coarser side so that a pixel is as high as it is wide.

    Args:
        image: (H, W).
        spacing: distance of rows and of columns, in any one unit; unusable ones count as equal,
            as do those within 3 %.
        options: limits of the result.

    Raises:
        RejectedImage: the result is too small, too large or too elongated.
    """
    height, width = image.shape
    row_distance, column_distance = spacing
    if np.isfinite(spacing).all() and min(spacing) > 0.0:
        finest = min(spacing)
        if max(spacing) > SQUARE_PIXEL_TOLERANCE * finest:
            height = round(height * row_distance / finest)
            width = round(width * column_distance / finest)
    check_size(height, width, min_side=options.min_side, max_pixels=options.max_pixels)
    if (height, width) == image.shape:
        return image
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR))
