"""Decode a file's bytes to grayscale slices, or report why they are rejected."""

import io
import logging
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from brainray.mri.identity import content_hash
from brainray.mri.slices import (
    MIN_GREYS,
    DecodedSlice,
    DecodeOptions,
    RejectedImage,
    nifti_head,
    replace_non_finite,
    to_uint8,
    volume_hash,
)

VERSION = 4
"""Increased whenever a file decodes to different pixels: slices of two versions are never mixed."""

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "DICOM", "NIfTI")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".gif"),
    *(".dcm", ".dicom", ".ima", ".nii", ".nii.gz"),
)
"""Lower-case suffixes of files that may contain slices; DICOM files often have none."""

DICOM_HEAD_BYTES = 132

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
)
# TIFF tags and some of their values.
_SUBFILE_TYPE, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 254, 258, 262, 339
_WHITE_IS_ZERO = 0
_UNSIGNED, _SIGNED = 1, 2
# JPEG and interpolation blur masks. None of 6,363 public slices, however dark, reaches 0.86 and
# 0.33; more than 0.8 of bright pixels are a page around a small slice.
_MASK_TOLERANCE = 1 / 16  # of the brightest grey
_MASK_SHARE, _MASK_BRIGHT_SHARE, _MASK_MAX_BRIGHT = 0.97, 0.5, 0.8
# The messages of these loggers quote header fields.
_SILENCE = threading.RLock()
_TALKATIVE_LOGGERS = {"TIFF": "PIL", "DICOM": "pydicom", "NIfTI": "nibabel"}


def decode_file(content: bytes, options: DecodeOptions) -> list[DecodedSlice]:
    """Decode either all slices of a file to 8-bit grayscale or none.

    The format is detected from the content, not from the file name.

    - JPEG, PNG, BMP, GIF: one slice, rotated according to its EXIF orientation. Colour is converted
      to luminance (ITU-R 601), transparency is composited on black. 16-bit and float images are
      scaled linearly from their own minimum and maximum to 0..255; the brightest thousandth is
      clipped if it would leave fewer than 64 greys to the rest (dead pixels). Animations are
      rejected.
    - TIFF: the same, and every page is a slice; the pages of a stack share a subject.
    - DICOM: see `brainray.mri.dicom`; NIfTI, also compressed: see `brainray.mri.nifti`.

    No other header content is returned, or appears in an exception, a log line or a warning.

    Raises:
        RejectedImage: the file is empty, not an image, truncated or corrupt, too small, too
            large, ...
    """
    if not content:
        raise RejectedImage("empty file")
    file_format = sniff(content)
    if not file_format:
        raise RejectedImage("not an image", f"no {', '.join(FORMATS)} header")
    try:
        with _silenced(_TALKATIVE_LOGGERS.get(file_format)):
            return _decode(content, file_format, options)
    except RejectedImage:
        raise
    except Exception as error:  # decoders may raise anything on hostile bytes
        failure = type(error).__name__
    # Raised here so that the decoder's exception, which may quote the header, is not chained.
    raise RejectedImage("corrupt or truncated", f"the {file_format} decoder raised {failure}")


def sniff(content: bytes) -> str:
    """One of `FORMATS`, from the first bytes of a file; "" if they match none."""
    # Checked first, as a DICOM file may begin with the signature of another format.
    if looks_like_dicom(content):
        return "DICOM"
    for signature, file_format in _SIGNATURES:
        if content.startswith(signature):
            return file_format
    head = nifti_head(content)
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "NIfTI"
    return "DICOM" if _begins_with_dicom_element(content) else ""


def looks_like_dicom(head: bytes) -> bool:
    """Whether a file without a known suffix is DICOM, from its first `DICOM_HEAD_BYTES`."""
    return head[128:DICOM_HEAD_BYTES] == b"DICM"


def check_content(image: NDArray[np.uint8], *, min_intensity_std: float) -> None:
    """Reject a blank or near-constant slice, and masks and label maps.

    Raises:
        RejectedImage: the standard deviation (of 0..255) is below ``min_intensity_std``, it has
            fewer than `MIN_GREYS` greys, or almost only black and one other.
    """
    deviation = float(cv2.meanStdDev(image)[1].item())  # twenty times as fast as NumPy
    if deviation < min_intensity_std:
        raise RejectedImage("blank", f"intensity standard deviation {deviation:.2f} of 0..255")
    counts = cv2.calcHist([image], [0], None, [256], [0, 256]).ravel()
    if np.count_nonzero(counts) < MIN_GREYS:
        raise RejectedImage("no scan", f"fewer than {MIN_GREYS} greys: a mask or label map")
    if _is_blurred_mask(counts):
        raise RejectedImage("no scan", "almost only black and one grey: a mask or line art")


def _is_blurred_mask(counts: NDArray[np.float32]) -> bool:
    """Whether nearly all pixels are almost black or almost of the brightest grey, and most that
    are not black are bright; ``counts`` are those of the 256 greys.
    """
    brightest = int(np.flatnonzero(counts)[-1])
    tolerance = round(_MASK_TOLERANCE * brightest)
    num_pixels = counts.sum()
    black, bright = counts[: tolerance + 1].sum(), counts[brightest - tolerance :].sum()
    return bool(
        black + bright >= _MASK_SHARE * num_pixels
        and _MASK_BRIGHT_SHARE * (num_pixels - black) < bright <= _MASK_MAX_BRIGHT * num_pixels
    )


@contextmanager
def _silenced(logger_name: str | None) -> Iterator[None]:
    """Suppress warnings, and this logger and its children; one thread at a time, since both
    settings are the process's.
    """
    logger = logging.getLogger(logger_name) if logger_name else None
    with _SILENCE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logger.level if logger else logging.NOTSET
        try:
            if logger:
                logger.setLevel(logging.CRITICAL + 1)
            yield
        finally:
            if logger:
                logger.setLevel(level)


def _decode(content: bytes, file_format: str, options: DecodeOptions) -> list[DecodedSlice]:
    # Imported on demand: both take a second, which folders of plain images do not need.
    if file_format == "DICOM":
        from brainray.mri import dicom

        return dicom.decode_dicom(content, options)
    if file_format == "NIfTI":
        from brainray.mri import nifti

        return nifti.decode_nifti(content, options)
    return _decode_picture(content, file_format, options)


def _begins_with_dicom_element(content: bytes) -> bool:
    """DICOM without a preamble, as in old archives: the first element is of group 2 or 8."""
    if len(content) < DICOM_HEAD_BYTES:
        return False
    group, element, length = struct.unpack_from("<HHI", content)
    explicit = content[4:6].isalpha() and content[4:6].isupper()
    return group in (0x0002, 0x0008) and element <= 0x0020 and (explicit or length <= 64)


def _decode_picture(content: bytes, file_format: str, options: DecodeOptions) -> list[DecodedSlice]:
    try:
        picture = Image.open(io.BytesIO(content), formats=(file_format,))
    except UnidentifiedImageError:
        kinds = (
            ", or a data type that Pillow cannot read" if file_format in {"TIFF", "JPEG"} else ""
        )
        raise RejectedImage("corrupt or truncated", f"the {file_format} header{kinds}") from None
    except Image.DecompressionBombError:
        detail = f"the {file_format} header announces more pixels than Pillow opens"
        raise RejectedImage("too large", detail) from None
    with picture:
        if file_format == "TIFF":
            return _decode_pages(content, picture, options)
        # Phones store a preview as a second JPEG frame, which is not an animation.
        if file_format != "JPEG" and getattr(picture, "is_animated", False):
            raise RejectedImage("animated image", "several frames")
        _check_picture(picture, options)
        return [DecodedSlice(_to_grayscale(picture), file_format)]


def _decode_pages(
    content: bytes, picture: Image.Image, options: DecodeOptions
) -> list[DecodedSlice]:
    images = []
    num_voxels = 0
    for page in range(getattr(picture, "n_frames", 1)):
        picture.seek(page)
        if _is_preview(picture):
            continue
        _check_picture(picture, options)
        num_voxels += picture.width * picture.height
        options.check_num_voxels(num_voxels)
        images.append((f"frame={page}", _to_grayscale(picture)))
    if not images:
        raise RejectedImage("corrupt or truncated", "the TIFF has no full-resolution page")
    if len(images) == 1:
        return [DecodedSlice(images[0][1], "TIFF")]
    subject = volume_hash(content_hash(content), options.salt)
    return [DecodedSlice(image, "TIFF", frame, subject) for frame, image in images]


def _is_preview(picture: Image.Image) -> bool:
    """Whether the page is a low-resolution copy of another (tag NewSubfileType, bit 0)."""
    return bool(_tag(picture, _SUBFILE_TYPE) & 1)


def _check_picture(picture: Image.Image, options: DecodeOptions) -> None:
    width, height = picture.size
    options.check_size(height, width)


def _to_grayscale(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode in {"I", "F"} or picture.mode.startswith("I;"):
        pixels = np.array(_upright(picture))
        if picture.mode == "I" and _tag(picture, _SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED:
            pixels = pixels.view(np.uint32)  # Pillow has no mode for these
        values = replace_non_finite(pixels.astype(np.float64))
        if _tag(picture, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
            values = -values  # as Pillow does for 8 bits
        low, rest, high = np.percentile(values, [0.0, 99.9, 100.0])
        above = values[values > low].min(initial=high)
        if 0 < 4 * (rest - above) < above - low:  # the lowest value marks missing data
            low = above
        return to_uint8(values, low, rest if 0 < 4 * (rest - low) < high - low else high)
    has_16_bits = ";16" in str(getattr(picture, "tile", "")) or _tag(picture, _BITS, 8) > 8
    if len(picture.getbands()) > 1 and has_16_bits:  # Pillow would drop half of the bits
        raise RejectedImage(
            "unsupported data type", "16-bit colour: convert it to grayscale or to 8 bits"
        )
    if _tag(picture, _SAMPLE_FORMAT) == _SIGNED:  # Pillow would wrap negative values
        raise RejectedImage(
            "unsupported data type", "signed 8-bit pixels: convert them to 16 bits or to unsigned"
        )
    picture = _upright(picture)
    if picture.has_transparency_data:
        colour = picture.convert("RGBA")
        black = Image.new("RGBA", colour.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(black, colour)
    elif picture.mode not in {"L", "RGB", "YCbCr", "P", "1"}:
        picture = picture.convert("RGB")  # not all modes convert to luminance directly
    return np.asarray(picture if picture.mode == "L" else picture.convert("L"))


def _tag(picture: Image.Image, tag: int, default: int = 0) -> int:
    """A TIFF tag of the first channel; the default if it is absent or this is not a TIFF."""
    value = getattr(picture, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _upright(picture: Image.Image) -> Image.Image:
    """The picture as viewers show it, which is how it was labelled."""
    picture.load()  # raises if it is damaged, and a PNG may store its orientation after its pixels
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # Pillow may raise anything on invalid metadata
        return picture
