"""From a file's bytes to a grayscale slice, or to the reason why not."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "TIFF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")


class RejectedImage(Exception):
    """A file that is left out: ``reason`` is a fixed phrase to count, ``detail`` free text."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class DecodedSlice:
    """A grayscale slice as it was stored."""

    image: NDArray[np.uint8]  # (H, W)
    format: str


def decode_slice(content: bytes, *, min_side: int, max_pixels: int) -> DecodedSlice:
    """Decode JPEG, PNG, TIFF or BMP to 8-bit grayscale, whole or not at all.

    Colour is converted by luminance (ITU-R 601); 16-bit and float images are scaled linearly
    from their own minimum and maximum to 0..255. Of several frames the first is read.

    Raises:
        RejectedImage: empty, not an image, truncated or corrupt, too small, too large.
    """
    if not content:
        raise RejectedImage("empty file")
    try:
        with warnings.catch_warnings():
            # Pillow warns of oddities in files that it then reads well.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                width, height = picture.size
                _check_size(height, width, min_side, max_pixels)
                file_format = str(picture.format)
                image = _to_uint8(picture)
    except RejectedImage:
        raise
    except UnidentifiedImageError:
        raise RejectedImage("not an image", f"no {', '.join(FORMATS)} header") from None
    except Image.DecompressionBombError as error:
        raise RejectedImage("too large", str(error)) from None
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        raise RejectedImage("corrupt or truncated", f"{type(error).__name__}: {error}") from None
    return DecodedSlice(image=image, format=file_format)


def check_content(image: NDArray[np.uint8], *, min_intensity_std: float) -> None:
    """Refuse a blank or near-constant slice.

    Raises:
        RejectedImage: the standard deviation (of 0..255) is below ``min_intensity_std``.
    """
    deviation = float(image.std())
    if deviation < min_intensity_std:
        raise RejectedImage("blank", f"intensity standard deviation {deviation:.2f} of 0..255")


def _check_size(height: int, width: int, min_side: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise RejectedImage("too large", f"{width} x {height} pixels, limit {max_pixels}")
    if min(height, width) < min_side:
        raise RejectedImage("too small", f"{width} x {height} pixels, shortest side {min_side}")


def _to_uint8(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode in {"I", "F"} or picture.mode.startswith("I;"):
        values = np.asarray(picture, dtype=np.float64)
        if not np.isfinite(values).all():
            raise RejectedImage("non-finite pixels")
        low, high = values.min(), values.max()
        scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
        return scaled.round().astype(np.uint8)
    return np.asarray(picture.convert("L"))
