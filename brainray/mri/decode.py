"""From a file's bytes to its grayscale slices, or to the reason why not."""

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from brainray.mri.slices import (
    DecodedSlice,
    DecodeOptions,
    RejectedImage,
    check_num_voxels,
    check_size,
    replace_non_finite,
    to_uint8,
    volume_hash,
)

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "VERSION",
    "DecodeOptions",
    "DecodedSlice",
    "RejectedImage",
    "check_content",
    "decode_file",
    "looks_like_dicom",
    "sniff",
]

VERSION = 1
"""Raised whenever files give other slices than before: those of two versions are not mixed."""

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "DICOM", "NIfTI")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".gif"),
    *(".dcm", ".dicom", ".ima", ".nii", ".nii.gz"),
)
"""Lower-case endings of files that may hold slices; DICOM files often have none."""

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
_GZIP = b"\x1f\x8b"
# Tags of a TIFF, and values of theirs.
_SUBFILE_TYPE, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 254, 258, 262, 339
_WHITE_IS_ZERO = 0
_UNSIGNED, _SIGNED = 1, 2
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture of an EXIF orientation upright; 1 is upright."""
_NIFTI_HEAD_BYTES = 348
# Their messages quote header fields.
_TALKATIVE_LOGGERS = {"TIFF": "PIL", "DICOM": "pydicom", "NIfTI": "nibabel"}


def decode_file(content: bytes, options: DecodeOptions) -> list[DecodedSlice]:
    """Decode all slices of a file to 8-bit grayscale, the whole file or nothing of it.

    The format is found by content, whatever the file is called.

    - JPEG, PNG, BMP, GIF: one slice, turned as its EXIF orientation says. Colour is converted by
      luminance (ITU-R 601), transparency laid on black; 16-bit and float images are scaled
      linearly from their own minimum and maximum to 0..255, without the brightest thousandth where
      that would leave the rest fewer than 64 greys (dead pixels). Animations are refused.
    - TIFF: the same, and every page is a slice; the pages of a stack share a subject.
    - DICOM: `brainray.mri.dicom`; NIfTI, also compressed: `brainray.mri.nifti`.

    Nothing else that a file's header says is returned, raised, logged or warned of.

    Raises:
        RejectedImage: empty, not an image, truncated or corrupt, too small, too large, ...
    """
    if not content:
        raise RejectedImage("empty file")
    file_format = sniff(content)
    if not file_format:
        raise RejectedImage("not an image", f"no header of {', '.join(FORMATS)}")
    try:
        with _silenced(_TALKATIVE_LOGGERS.get(file_format)):
            return _decode(content, file_format, options)
    except RejectedImage:
        raise
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        failure = type(error).__name__
    # Out here the decoder's exception, whose text may quote the header, is not chained.
    raise RejectedImage("corrupt or truncated", f"the {file_format} decoder stopped at {failure}")


def sniff(content: bytes) -> str:
    """One of `FORMATS` by the first bytes of a file, "" where they tell of none."""
    # First: a DICOM file may begin with the signature of another format.
    if looks_like_dicom(content):
        return "DICOM"
    for signature, file_format in _SIGNATURES:
        if content.startswith(signature):
            return file_format
    head = _decompressed_head(content) if content.startswith(_GZIP) else content[:540]
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "NIfTI"
    return "DICOM" if _begins_with_dicom_element(content) else ""


def looks_like_dicom(head: bytes) -> bool:
    """Whether a file without a telling name is DICOM, by its first `DICOM_HEAD_BYTES`."""
    return head[128:DICOM_HEAD_BYTES] == b"DICM"


def check_content(image: NDArray[np.uint8], *, min_intensity_std: float) -> None:
    """Refuse a blank or near-constant slice.

    Raises:
        RejectedImage: the standard deviation (of 0..255) is below ``min_intensity_std``.
    """
    deviation = float(cv2.meanStdDev(image)[1].item())  # NumPy's takes twenty times as long
    if deviation < min_intensity_std:
        raise RejectedImage("blank", f"intensity standard deviation {deviation:.2f} of 0..255")


@contextmanager
def _silenced(logger_name: str | None) -> Iterator[None]:
    """No warnings, and nothing from this logger and those below it."""
    logger = logging.getLogger(logger_name) if logger_name else None
    level = logger.level if logger else logging.NOTSET
    try:
        if logger:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if logger:
            logger.setLevel(level)


def _decode(content: bytes, file_format: str, options: DecodeOptions) -> list[DecodedSlice]:
    # Imported on demand: the two take a second, which folders of plain images need not spend.
    if file_format == "DICOM":
        from brainray.mri import dicom

        return dicom.decode_dicom(content, options)
    if file_format == "NIfTI":
        from brainray.mri import nifti

        return nifti.decode_nifti(content, options)
    return _decode_picture(content, file_format, options)


def _decompressed_head(content: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(content[:65_536], _NIFTI_HEAD_BYTES)
    except zlib.error:
        return b""


def _begins_with_dicom_element(content: bytes) -> bool:
    """DICOM as old archives wrote it, without preamble: a first element of group 2 or 8."""
    if len(content) < DICOM_HEAD_BYTES:
        return False
    group, element, length = struct.unpack_from("<HHI", content)
    explicit = content[4:6].isalpha() and content[4:6].isupper()
    return group in (0x0002, 0x0008) and element <= 0x0020 and (explicit or length <= 64)


def _decode_picture(content: bytes, file_format: str, options: DecodeOptions) -> list[DecodedSlice]:
    try:
        picture = Image.open(io.BytesIO(content), formats=(file_format,))
    except UnidentifiedImageError:
        failure = "corrupt or truncated"
    except Image.DecompressionBombError:
        failure = "too large"
    else:
        with picture:
            if file_format == "TIFF":
                return _decode_pages(content, picture, options)
            # Phones store a JPEG's preview as a second frame: that is no animation.
            if file_format != "JPEG" and getattr(picture, "is_animated", False):
                raise RejectedImage("animated image", "several frames")
            _check_picture(picture, options)
            return [DecodedSlice(_to_grayscale(picture), file_format)]
    kinds = ", or a data type that Pillow does not read" if file_format == "TIFF" else ""
    raise RejectedImage(failure, f"the header of a {file_format}{kinds}")


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
        check_num_voxels(num_voxels, options.max_voxels)
        images.append((f"frame={page}", _to_grayscale(picture)))
    if not images:
        raise RejectedImage("corrupt or truncated", "a TIFF without a full page")
    if len(images) == 1:
        return [DecodedSlice(images[0][1], "TIFF")]
    subject = volume_hash(content, options.salt)
    return [DecodedSlice(image, "TIFF", frame, subject) for frame, image in images]


def _is_preview(picture: Image.Image) -> bool:
    """A page that repeats another one in lower resolution (tag NewSubfileType, bit 0)."""
    return bool(_tag(picture, _SUBFILE_TYPE) & 1)


def _check_picture(picture: Image.Image, options: DecodeOptions) -> None:
    width, height = picture.size
    check_size(height, width, min_side=options.min_side, max_pixels=options.max_pixels)


def _to_grayscale(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode in {"I", "F"} or picture.mode.startswith("I;"):
        pixels = np.array(_upright(picture))
        if picture.mode == "I" and _tag(picture, _SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED:
            pixels = pixels.view(np.uint32)  # which Pillow has no mode for
        values = replace_non_finite(pixels.astype(np.float64))
        if _tag(picture, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
            values = -values  # as Pillow does with 8 bits
        low, rest, high = np.percentile(values, [0.0, 99.9, 100.0])
        above = values[values > low].min(initial=high)
        if 0 < 4 * (rest - above) < above - low:  # the value that stands for no data
            low = above
        return to_uint8(values, low, rest if 0 < 4 * (rest - low) < high - low else high)
    has_16_bits = ";16" in str(getattr(picture, "tile", "")) or _tag(picture, _BITS, 8) > 8
    if len(picture.getbands()) > 1 and has_16_bits:  # Pillow would read half of the bits
        raise RejectedImage("unsupported data type", "colour of 16 bits: store it as grey, or as 8")
    if _tag(picture, _SAMPLE_FORMAT) == _SIGNED:  # Pillow would wrap what is below 0
        raise RejectedImage("unsupported data type", "signed 8 bits: store them as 16, or unsigned")
    picture = _upright(picture)
    if picture.has_transparency_data:
        colour = picture.convert("RGBA")
        black = Image.new("RGBA", colour.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(black, colour)
    elif picture.mode not in {"L", "RGB", "YCbCr", "P", "1"}:
        picture = picture.convert("RGB")  # not all modes know the way to luminance
    return np.asarray(picture if picture.mode == "L" else picture.convert("L"))


def _tag(picture: Image.Image, tag: int, default: int = 0) -> int:
    """Of a TIFF, for its first channel; the default where it is absent, as in other pictures."""
    value = getattr(picture, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _upright(picture: Image.Image) -> Image.Image:
    """As viewers show it, which is what its label was given to."""
    picture.load()  # a PNG may tell its orientation after its pixels
    if "exif" not in picture.info:
        return picture
    try:
        orientation = picture.getexif().get(Base.Orientation)
    except Exception:  # Pillow raises nearly anything on metadata that are none
        return picture
    turn = _TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)
