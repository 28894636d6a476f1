"""Decoded slices, rejections, and functions shared by all file formats."""

import gzip
import hashlib
import hmac
import io
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Values: TypeAlias = NDArray[np.floating]

Orientation = Literal["axial", "coronal", "sagittal"]
ORIENTATIONS: tuple[Orientation, ...] = ("axial", "coronal", "sagittal")

GZIP = b"\x1f\x8b"
_NIFTI_HEAD_BYTES = 540

MAX_INFINITE_SHARE = 0.01
MAX_NAN_SHARE = 0.95
# Each of these, used as an identity, would merge all patients.
_NOBODY = frozenset(
    {
        *("anon", "anonymous", "anonymouspatient", "anonymized", "anonymised"),
        *("none", "null", "na", "nan", "unknown", "unspecified", "notavailable", "notapplicable"),
        *("removed", "redacted", "deleted", "deidentified", "deid", "patient", "patientid"),
        *("anonym", "anonymizedpatient", "noname", "unknownpatient", "hidden", "masked", "dummy"),
        *("anonpatient", "unknownunknown", "noid", "patid", "notspecified", "undefined"),
        *("unavailable",),
    }
)
MIN_GREYS = 16  # masks and label maps have fewer, the public slices 127 and more
MAX_ASPECT_RATIO = 10.0  # sides of a slice on screen; heads stay below 2, panoramas below 8
SQUARE_PIXEL_TOLERANCE = 1.03  # ratio of two spacings that still counts as square

_LEAST_SPAN = 2**-12  # of the largest value: less leaves fewer than 12 bits of a float32
_SUBJECT_ID_DIGITS = 32


class RejectedImage(Exception):
    """A rejected file: ``reason`` is a fixed phrase that can be counted, ``detail`` is free text.

    Neither ever quotes the file: headers contain names, dates and identifiers.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both, so that it can be pickled
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def commonest_reasons(rejections: Sequence[tuple[str, str | None]]) -> str:
    """The three commonest reasons of (reason, detail), each with its count and commonest detail."""
    found = []
    for reason, count in Counter(reason for reason, _ in rejections).most_common(3):
        details = Counter(detail for other, detail in rejections if other == reason and detail)
        commonest = "".join(f"; {detail}" for detail, _ in details.most_common(1))
        found.append(f"{reason} ({count}{commonest})")
    return ", ".join(found)


@dataclass(frozen=True)
class DecodeOptions:
    """Limits for decoding, and how volumes are sliced."""

    min_side: int
    """Slices with a smaller height or width, in pixels, are rejected."""
    max_pixels: int
    """Limit for one slice, checked on the header."""
    max_voxels: int
    """Limit for all frames or volumes of a file together, checked on the header."""
    axis: Orientation
    """The plane in which NIfTI volumes are sliced."""
    window_percentiles: tuple[float, float]
    """Foreground percentiles that map to 0 and 255 if the file has no window."""
    min_foreground: float
    """Slices of a NIfTI volume with a smaller share of foreground are skipped as empty."""
    salt: bytes
    """Secret key of the subject hashes: without it, short patient IDs could be guessed."""

    def __post_init__(self) -> None:
        if not self.salt:
            raise ValueError("salt must not be empty: patient IDs are easily guessed")

    def check_size(self, height: int, width: int) -> None:
        """Reject a slice that is too small, too large or too elongated.

        Raises:
            RejectedImage: with the reason.
        """
        size = f"{width} x {height} pixels"
        if height * width > self.max_pixels:
            raise RejectedImage("too large", f"{size}, limit {self.max_pixels}")
        if min(height, width) < max(self.min_side, 1):
            raise RejectedImage("too small", f"{size}, shortest side {self.min_side}")
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise RejectedImage("too elongated", size)

    def check_num_voxels(self, num_voxels: int) -> None:
        """Reject a file with too many voxels before it is decoded.

        Raises:
            RejectedImage: the file announces more voxels than the limit.
        """
        if num_voxels > self.max_voxels:
            raise RejectedImage("too large", f"{num_voxels} voxels, limit {self.max_voxels}")


@dataclass(frozen=True)
class DecodedSlice:
    """A grayscale slice as shown on screen."""

    image: NDArray[np.uint8]  # (H, W)
    format: str  # JPEG, PNG, TIFF, BMP, GIF, DICOM or NIfTI
    frame: str = ""
    """Position in its file, counted from 0, such as ``frame=3``; empty if it is the only slice."""
    subject_id: str | None = None
    """Keyed hash of the patient or the volume; None if the file identifies neither."""
    study_id: str | None = None
    """Keyed hash of the DICOM study, also if the file names its patient."""
    rejection: RejectedImage | None = None
    """Why this volume of several has no slices, or this frame is none; its image is not used."""


STUDY_PREFIX = "study-"
"""Prefix of the subject id of slices whose header identifies a study but not a patient."""


def names_nobody(identity: str) -> bool:
    """Whether an identity is a placeholder, as written by de-identification tools and in tables."""
    word = "".join(letter for letter in identity.casefold() if letter.isalnum())
    return not word or word in _NOBODY or word == len(word) * "x" != "x"


def subject_hash(kind: str, identity: str, salt: bytes) -> str:
    """HMAC-SHA256 of an identity, 32 hex digits; equal strings of two kinds differ.

    As long as the salt is secret, the identity cannot be recovered by guessing.
    """
    digest = hmac.new(salt, f"{kind}\0{identity}".encode(), hashlib.sha256)
    return digest.hexdigest()[:_SUBJECT_ID_DIGITS]


def volume_hash(sha256: str, salt: bytes) -> str:
    """The subject of a file that is one volume without a patient, from the hash of its content."""
    return subject_hash("volume", sha256, salt)


def nifti_head(content: bytes) -> bytes:
    """The first bytes of a file, decompressed: all of a NIfTI-1 or NIfTI-2 header."""
    if not content.startswith(GZIP):
        return content[:_NIFTI_HEAD_BYTES]
    try:
        return gzip.GzipFile(fileobj=io.BytesIO(content)).read(_NIFTI_HEAD_BYTES)
    except (OSError, EOFError, zlib.error):
        return b""


def replace_non_finite(values: Values) -> Values:
    """Replace NaN and infinities by the smallest finite value, in place.

    NaN marks missing data, such as around an extracted brain: up to 95 % are allowed. Infinities
    are errors: up to 1 % are allowed.

    Raises:
        RejectedImage: there are more of them.
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
    """The value above which a voxel belongs to the head rather than to the surrounding air.

    A tenth of the way from the 2nd to the 98th percentile, which is robust to a few hot or dead
    voxels: Smith, "Fast robust automated brain extraction", 2002, section "Intensity estimation".
    """
    low, high = np.percentile(values, (2.0, 98.0))
    return float(low + 0.1 * (high - low))


def foreground_window(values: Values, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Two percentiles of the foreground, or the full range if they coincide."""
    foreground = values[values > foreground_threshold(values)]
    if foreground.size:
        low, high = np.percentile(foreground, percentiles)
        if high > low:
            return float(low), float(high)
    return float(values.min()), float(values.max())


def in_float32(voxels: NDArray[Any]) -> Values:
    """A copy of the values, minus the smallest if float32 would not resolve values that far off."""
    if voxels.dtype.kind == "f":
        finite = np.isfinite(voxels)
        low = float(voxels.min(where=finite, initial=np.inf))
        high = float(voxels.max(where=finite, initial=-np.inf))
    else:
        low, high = float(voxels.min()), float(voxels.max())
    if 0 < high - low < max(abs(low), abs(high)) * _LEAST_SPAN:
        voxels = voxels - np.float64(low)
    return np.array(voxels, dtype=np.float32)


def to_uint8(values: Values, low: float, high: float) -> NDArray[np.uint8]:
    """Map ``low``..``high`` linearly to 0..255 and clip; all 0 if the range is empty."""
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    # Clip before the subtraction: float32 values far outside could overflow.
    scaled = (np.clip(values, low, high) - low) * (255.0 / (high - low))
    return np.clip(scaled, 0.0, 255.0).round().astype(np.uint8)


def to_square_pixels(
    image: NDArray[np.uint8], spacing: tuple[float, float], options: DecodeOptions
) -> NDArray[np.uint8]:
    """Enlarge the coarser side so that a pixel is as high as it is wide.

    Args:
        image: (H, W).
        spacing: distance between rows and between columns, in the same unit; unusable ones count
            as equal, as do those within 3 %.
        options: limits for the result.

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
    options.check_size(height, width)
    if (height, width) == image.shape:
        return image
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR))
