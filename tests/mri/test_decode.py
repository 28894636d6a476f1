"""A file becomes a grayscale slice, or a counted reason."""

import io

import numpy as np
import pytest
from PIL import Image

from brainray.mri.decode import RejectedImage, check_content, decode_slice

LIMITS = {"min_side": 16, "max_pixels": 1_000_000}
RAMP = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))  # (48, 64)


def encode(array: np.ndarray, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "BMP"])
def test_lossless_formats_give_the_pixels_back(file_format: str) -> None:
    decoded = decode_slice(encode(RAMP, file_format), **LIMITS)
    assert decoded.format == file_format
    np.testing.assert_array_equal(decoded.image, RAMP)


def test_jpeg_is_close_and_colour_of_equal_channels_is_grey() -> None:
    grey = decode_slice(encode(RAMP, "JPEG", quality=95), **LIMITS).image
    colour = decode_slice(encode(np.dstack([RAMP] * 3), "PNG"), **LIMITS).image
    assert np.abs(grey.astype(int) - RAMP).max() <= 4
    np.testing.assert_array_equal(colour, RAMP)


def test_sixteen_bits_are_scaled_from_their_own_range() -> None:
    deep = RAMP.astype(np.uint16) * 100 + 1000
    image = decode_slice(encode(deep, "PNG"), **LIMITS).image
    expected = np.round((deep - deep.min()) * 255.0 / (deep.max() - deep.min()))
    np.testing.assert_array_equal(image, expected.astype(np.uint8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"this is a text file named .jpg", "not an image"),
        (encode(RAMP, "PNG")[:60], "corrupt or truncated"),
        (encode(RAMP, "JPEG")[:400], "corrupt or truncated"),
        (encode(RAMP[:10], "PNG"), "too small"),
        (encode(np.zeros((1001, 1000), np.uint8), "PNG"), "too large"),
        (encode(RAMP, "GIF"), "not an image"),
    ],
)
def test_what_cannot_be_used_has_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(RejectedImage) as rejection:
        decode_slice(content, **LIMITS)
    assert rejection.value.reason == reason


def test_a_huge_header_is_refused_before_decoding() -> None:
    # A 30,000 x 30,000 PNG: signature and header only, so decoding would fail otherwise.
    png = bytearray(encode(RAMP, "PNG"))
    png[16:24] = (30_000).to_bytes(4, "big") * 2
    with pytest.raises(RejectedImage) as rejection:
        decode_slice(bytes(png), **LIMITS)
    assert rejection.value.reason in {"too large", "not an image", "corrupt or truncated"}


def test_every_truncation_of_a_jpeg_is_rejected_or_whole() -> None:
    whole = encode(RAMP, "JPEG", quality=90)
    reference = decode_slice(whole, **LIMITS).image
    for length in range(0, len(whole) - 2, 37):
        with pytest.raises(RejectedImage):
            decode_slice(whole[:length], **LIMITS)
    np.testing.assert_array_equal(decode_slice(whole, **LIMITS).image, reference)


def test_blank_slices_are_rejected_and_others_are_not() -> None:
    blank = np.full((32, 32), 7, np.uint8)
    blank[0, 0] = 20
    with pytest.raises(RejectedImage, match="blank"):
        check_content(blank, min_intensity_std=2.0)
    check_content(RAMP, min_intensity_std=2.0)
