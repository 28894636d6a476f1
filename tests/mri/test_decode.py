"""A plain image file becomes grayscale slices, or a counted reason."""

import dataclasses
import io
import logging
import pickle
import random
import struct
import threading
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from brainray.mri import decode
from brainray.mri.decode import check_content, decode_file, looks_like_dicom, sniff
from brainray.mri.phantom import CLASSES, make_slice
from brainray.mri.slices import (
    DecodedSlice,
    DecodeOptions,
    RejectedImage,
    commonest_reasons,
)
from tests.mri.decoding import OPTIONS

RAMP = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))  # (48, 64)
LOSSLESS = ["PNG", "TIFF", "BMP", "GIF"]


def encode(array: np.ndarray | Image.Image, file_format: str, **options: object) -> bytes:
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def decode_one(content: bytes) -> np.ndarray:
    (decoded,) = decode_file(content, OPTIONS)
    assert decoded.image.dtype == np.uint8
    assert decoded.frame == ""
    assert decoded.subject_id is None
    return decoded.image


def reason_of(content: bytes, options: DecodeOptions = OPTIONS) -> str:
    with pytest.raises(RejectedImage) as rejection:
        decode_file(content, options)
    return rejection.value.reason


def stack(*pages: np.ndarray, file_format: str = "TIFF") -> bytes:
    first, *others = map(Image.fromarray, pages)
    return encode(first, file_format, save_all=True, append_images=others)


def raw_tiff(
    pixels: np.ndarray, bits: int, sample_format: int, num_channels: int = 1, planar: int = 1
) -> bytes:
    """A little-endian file of one strip (or one a channel) that no library here writes."""
    height, width = pixels.shape[-2:]
    data = pixels.tobytes()
    num_strips = num_channels if planar == 2 else 1
    tags: list[tuple[int, int, list[int]]] = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [bits] * num_channels),
        (259, 3, [1]),
        (262, 3, [2 if num_channels == 3 else 1]),
        (273, 4, [8 + number * len(data) // num_strips for number in range(num_strips)]),
        (277, 3, [num_channels]),
        (278, 4, [height]),
        (279, 4, [len(data) // num_strips] * num_strips),
        (284, 3, [planar]),
        (339, 3, [sample_format] * num_channels),
    ]
    directory, beside = struct.pack("<H", len(tags)), b""
    end = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            place = struct.pack("<I", end + len(beside))
            beside += packed
        else:
            place = packed.ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, kind, len(values)) + place
    header = b"II*\0" + struct.pack("<I", 8 + len(data))
    return header + data + directory + bytes(4) + beside


# --- What is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", LOSSLESS)
def test_lossless_formats_give_the_pixels_back(file_format: str) -> None:
    content = encode(RAMP, file_format)
    assert sniff(content) == file_format
    assert decode_file(content, OPTIONS)[0].format == file_format
    np.testing.assert_array_equal(decode_one(content), RAMP)


def test_unsigned_words_of_32_bits_are_read_as_such() -> None:
    image = decode_one(raw_tiff(RAMP.astype(np.uint32) << 24, 32, sample_format=1))
    np.testing.assert_allclose(image, RAMP * (255.0 / 252.0), atol=0.51)
    signed = (RAMP.astype(np.int32) - 126) << 20
    image = decode_one(raw_tiff(signed, 32, sample_format=2))
    np.testing.assert_allclose(image, RAMP * (255.0 / 252.0), atol=0.51)


def test_what_pillow_would_read_wrongly_is_refused() -> None:
    colour = np.stack([RAMP.astype(np.uint16) << 8] * 3)
    for content in (
        raw_tiff(colour, 16, sample_format=1, num_channels=3, planar=2),
        raw_tiff((RAMP.astype(int) - 126).astype(np.int8), 8, sample_format=2),
    ):
        assert reason_of(content) == "unsupported data type"
    np.testing.assert_array_equal(decode_one(raw_tiff(RAMP, 8, sample_format=1)), RAMP)


def test_jpeg_is_close_and_colour_of_equal_channels_is_grey() -> None:
    grey = decode_one(encode(RAMP, "JPEG", quality=95))
    colour = decode_one(encode(np.dstack([RAMP] * 3), "PNG"))
    assert np.abs(grey.astype(int) - RAMP).max() <= 4
    np.testing.assert_array_equal(colour, RAMP)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_from_their_own_range(file_format: str) -> None:
    deep = RAMP.astype(np.uint16) * 100 + 1000
    image = decode_one(encode(deep, file_format))
    expected = np.round((deep - deep.min()) * 255.0 / (deep.max() - deep.min()))
    np.testing.assert_array_equal(image, expected.astype(np.uint8))


def test_a_dead_pixel_does_not_darken_the_rest() -> None:
    deep = RAMP.astype(np.uint16) * 8
    whole = decode_one(encode(deep, "PNG"))
    deep[5, 5] = 65_535
    image = decode_one(encode(deep, "PNG"))
    assert image[5, 5] == 255
    others = np.arange(RAMP.size) != 5 * RAMP.shape[1] + 5
    np.testing.assert_allclose(image.ravel()[others], whole.ravel()[others].astype(int), atol=2)


@pytest.mark.parametrize("share", [0.001, 0.4])
def test_a_value_for_no_data_does_not_take_the_range(share: float) -> None:
    values = np.random.default_rng(0).uniform(0.2, 1.0, (64, 64)).astype(np.float32)
    values.flat[: round(share * values.size)] = -9999.0
    image = decode_one(encode(values, "TIFF"))
    assert len(np.unique(image)) > 200
    assert image.flat[0] == 0


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_colour_of_sixteen_bits_is_refused_and_not_cut_to_eight(suffix: str) -> None:
    grey = np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)
    for image in (np.dstack([grey] * 3), np.dstack([grey] * 4)):
        assert reason_of(cv2.imencode(suffix, image)[1].tobytes()) == "unsupported data type"
    assert len(np.unique(decode_one(cv2.imencode(suffix, grey)[1].tobytes()))) > 200


def test_floats_of_any_size_are_scaled_from_their_own_range() -> None:
    for scale in (1e-30, 1.0, 1e36):
        image = decode_one(encode((RAMP.astype(np.float32) - 50.0) * scale, "TIFF"))
        np.testing.assert_allclose(image, RAMP * (255.0 / 252.0), atol=0.51)


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_a_few_broken_floats_become_the_minimum_and_more_are_refused(bad: float) -> None:
    values = RAMP.astype(np.float32) + 100.0
    values[0, :30] = bad  # 30 of 3,072 pixels are just below one per cent
    image = decode_one(encode(values, "TIFF"))
    assert (image[0, :30] == 0).all()
    assert image.max() == 255
    values[1, 0] = bad
    assert reason_of(encode(values, "TIFF")) == "non-finite pixels"


@pytest.mark.parametrize("offset", [100.0, -300.0])  # 0 would be below all others, or above
def test_nan_is_no_data_and_nearly_nothing_else_is_refused(offset: float) -> None:
    values = RAMP.astype(np.float32) + offset
    values[8:] = np.nan  # around a brain that was cut out
    image = decode_one(encode(values, "TIFF"))
    assert (image[8:] == 0).all()
    assert image.max() == 255
    values[1:] = np.nan
    assert reason_of(encode(values, "TIFF")) == "non-finite pixels"


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "P", "LA", "RGBA", "1"])
def test_every_colour_mode_keeps_black_and_white_apart(mode: str) -> None:
    halves = np.zeros((32, 32), np.uint8)
    halves[:, 16:] = 255
    picture = Image.fromarray(halves).convert("RGB").convert(mode)
    file_format = "JPEG" if mode in {"CMYK", "YCbCr"} else "PNG"
    image = decode_one(encode(picture, file_format))
    assert image[:, :8].max() < 8
    assert image[:, 24:].min() > 247


def test_what_is_transparent_is_black_whatever_colour_it_hides() -> None:
    pixels = np.full((32, 32, 4), 255, np.uint8)
    pixels[:, :16, 3] = 0
    for picture in (Image.fromarray(pixels), Image.fromarray(pixels).convert("LA")):
        image = decode_one(encode(picture, "PNG"))
        assert (image[:, :16] == 0).all()
        assert (image[:, 16:] == 255).all()
    palette = Image.fromarray(RAMP // 4 % 2).convert("P")
    palette.putpalette([200] * 3 + [90] * 3)
    image = decode_one(encode(palette, "PNG", transparency=0))
    assert set(np.unique(image)) == {0, 90}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image = decode_one(encode(RAMP, file_format, exif=exif))
    assert np.abs(image.astype(int) - np.rot90(RAMP, -1)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_brought_upright_as_pillow_does(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(RAMP[:, :40], "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(decode_one(content), np.asarray(expected))


def test_a_picture_whose_exif_is_none_is_kept_as_it_is() -> None:
    content = encode(RAMP, "PNG", exif=b"Exif\0\0no header of a TIFF")
    np.testing.assert_array_equal(decode_one(content), RAMP)


def test_an_orientation_behind_the_pixels_of_a_png_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(RAMP, "PNG", exif=exif)
    start = content.index(b"eXIf") - 4
    (length,) = struct.unpack(">I", content[start : start + 4])
    chunk = content[start : start + 12 + length]
    end = content.index(b"IEND") - 4
    moved = content[:start] + content[start + len(chunk) : end] + chunk + content[end:]
    np.testing.assert_array_equal(decode_one(moved), np.rot90(RAMP, -1))


def test_a_tiff_of_sixteen_bits_whose_zero_is_white_is_no_negative() -> None:
    deep = RAMP.astype(np.uint16) * 100
    content = encode(deep.max() - deep, "TIFF")
    black_is_zero = struct.pack("<HHIH", 262, 3, 1, 1)
    assert content.count(black_is_zero) == 1
    white_is_zero = content.replace(black_is_zero, struct.pack("<HHIH", 262, 3, 1, 0))
    np.testing.assert_array_equal(decode_one(white_is_zero), decode_one(encode(deep, "TIFF")))


def test_every_page_of_a_tiff_is_a_slice_and_they_share_a_subject() -> None:
    pages = [RAMP, RAMP[::-1, ::-1], RAMP // 2]
    content = stack(*pages)
    decoded = decode_file(content, OPTIONS)
    assert [one.frame for one in decoded] == ["frame=0", "frame=1", "frame=2"]
    for one, page in zip(decoded, pages, strict=True):
        np.testing.assert_array_equal(one.image, page)
    (subject,) = {one.subject_id for one in decoded}
    assert subject is not None
    assert len(subject) == 32
    assert {one.subject_id for one in decode_file(stack(RAMP, RAMP), OPTIONS)} != {subject}
    resalted = dataclasses.replace(OPTIONS, salt=b"another")
    assert decode_file(content, resalted)[0].subject_id != subject


def test_a_reduced_copy_within_a_tiff_is_no_slice() -> None:
    preview = TiffImagePlugin.ImageFileDirectory_v2()
    preview[254] = 1
    buffer = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(buffer) as writer:
        Image.fromarray(RAMP).save(writer, "TIFF")
        writer.newFrame()
        Image.fromarray(RAMP[:4, :4]).save(writer, "TIFF", tiffinfo=preview)
    np.testing.assert_array_equal(decode_one(buffer.getvalue()), RAMP)


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"\0", "not an image"),
        (b"this is a text file named .jpg", "not an image"),
        (b"<html>" * 100, "not an image"),
        (b"\x1f\x8b" + b"\0" * 50, "not an image"),
        (b"PK\x03\x04" + b"\0" * 500, "not an image"),
        (encode(RAMP, "PNG")[:20], "corrupt or truncated"),
        (encode(RAMP, "PNG")[:60], "corrupt or truncated"),
        (encode(RAMP, "JPEG")[:400], "corrupt or truncated"),
        (encode(RAMP, "BMP")[:-100], "corrupt or truncated"),
        (encode(RAMP, "TIFF")[:-400], "corrupt or truncated"),
        (encode(RAMP, "GIF")[:900], "corrupt or truncated"),
        (encode(RAMP[:10], "PNG"), "too small"),
        (encode(np.zeros((1001, 1000), np.uint8), "PNG"), "too large"),
        (encode(np.zeros((20, 201), np.uint8), "PNG"), "too elongated"),
        (encode(np.zeros((201, 20), np.uint8), "PNG"), "too elongated"),
        (stack(RAMP, RAMP[:, ::-1], file_format="GIF"), "animated image"),
        (stack(RAMP, RAMP[:, ::-1], file_format="PNG"), "animated image"),
        (stack(RAMP, RAMP[:4]), "too small"),
    ],
)
def test_what_cannot_be_used_has_a_reason(content: bytes, reason: str) -> None:
    assert reason_of(content) == reason


def test_a_stack_is_limited_as_a_whole() -> None:
    tight = dataclasses.replace(OPTIONS, max_voxels=3 * RAMP.size - 1)
    assert len(decode_file(stack(RAMP, RAMP), tight)) == 2
    assert reason_of(stack(RAMP, RAMP, RAMP), tight) == "too large"


def huge_png(side: int) -> bytes:
    """A valid PNG of side x side zeros, as far as its first rows."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)


@pytest.mark.parametrize("side", [1_001, 30_000, 2_000_000_000])
def test_a_huge_header_is_refused_before_decoding(side: int) -> None:
    content = huge_png(side)
    tracemalloc.start()
    try:
        assert reason_of(content) == "too large"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_every_truncation_of_a_jpeg_is_rejected_or_whole() -> None:
    whole = encode(RAMP, "JPEG", quality=90)
    for length in range(0, len(whole) - 2, 37):
        reason_of(whole[:length])
    assert decode_one(whole).shape == RAMP.shape


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("TIFF", {"compression": "tiff_adobe_deflate"})]
)
def test_a_changed_byte_of_compressed_pixels_is_noticed(
    file_format: str, options: dict[str, str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, RAMP.shape).astype(np.uint8)
    content = bytearray(encode(noise, file_format, **options))
    content[len(content) // 2] ^= 0x10
    assert reason_of(bytes(content)) == "corrupt or truncated"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "BMP", "GIF"])
def test_broken_bytes_are_decoded_or_rejected_and_nothing_else(file_format: str) -> None:
    original = encode(RAMP, file_format)
    dice = random.Random(file_format)
    outcomes = set()
    for _ in range(150):
        try:
            for one in decode_file(damaged(original, dice), OPTIONS):
                assert one.image.dtype == np.uint8
                assert one.image.ndim == 2
            outcomes.add("decoded")
        except RejectedImage:
            outcomes.add("rejected")
    assert "rejected" in outcomes


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Cut short, or with some bytes changed, half of them in the header."""
    changed = bytearray(content)
    if dice.random() < 0.3:
        del changed[dice.randrange(len(changed)) :]
        return bytes(changed)
    reach = len(changed) if dice.random() < 0.5 else min(200, len(changed))
    for _ in range(dice.choice((1, 2, 8))):
        changed[dice.randrange(reach)] = dice.randrange(256)
    return bytes(changed)


def test_a_decoder_out_of_memory_rejects_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> list[DecodedSlice]:
        raise MemoryError("cannot hold JOHN DOE")

    monkeypatch.setattr(decode, "_decode_picture", exhausted)
    with pytest.raises(RejectedImage) as rejection:
        decode_file(encode(RAMP, "PNG"), OPTIONS)
    assert str(rejection.value) == "corrupt or truncated: the PNG decoder raised MemoryError"
    assert rejection.value.__context__ is None


# --- The rest ------------------------------------------------------------------------------------


def test_dicom_is_known_by_its_preamble_even_behind_another_signature() -> None:
    head = b"II*\0" + bytes(124) + b"DICM"
    assert looks_like_dicom(head)
    assert sniff(head) == "DICOM"
    assert not looks_like_dicom(head[:131])
    assert not looks_like_dicom(b"DICM" * 10)


def test_a_rejection_survives_its_way_between_processes() -> None:
    sent = RejectedImage("too small", "8 x 8 pixels")
    received = pickle.loads(pickle.dumps(sent))
    assert (received.reason, received.detail) == (sent.reason, sent.detail)
    assert str(received) == "too small: 8 x 8 pixels"


def test_a_missing_salt_is_refused() -> None:
    with pytest.raises(ValueError, match="salt"):
        dataclasses.replace(OPTIONS, salt=b"")


def test_blank_slices_are_rejected_and_others_are_not() -> None:
    blank = np.full((32, 32), 7, np.uint8)
    blank[0, 0] = 20
    with pytest.raises(RejectedImage, match="blank"):
        check_content(blank, min_intensity_std=2.0)
    check_content(RAMP, min_intensity_std=2.0)


def saved_mask(how: str) -> bytes:
    mask = np.zeros((128, 128), np.uint8)
    cv2.ellipse(mask, (70, 50), (24, 12), 20, 0, 360, 255, -1)
    if how == "smooth":
        return encode(cv2.resize(mask, (224, 224), interpolation=cv2.INTER_LINEAR), "PNG")
    if how == "regions":
        mask[45:55, 60:70] = 85
    if how == "colours":
        return encode(np.dstack([mask, np.roll(mask, 9, axis=0), np.zeros_like(mask)]), "PNG")
    if how == "ones":
        mask //= 255
    return encode(mask, "JPEG" if how == "jpeg" else "PNG")


@pytest.mark.parametrize("how", ["plain", "jpeg", "smooth", "regions", "colours", "ones"])
def test_a_mask_is_no_scan_however_it_was_saved(how: str) -> None:
    with pytest.raises(RejectedImage, match=r"no scan: .* a mask or"):
        check_content(decode_one(saved_mask(how)), min_intensity_std=0.0)


@pytest.mark.parametrize("name", CLASSES)
def test_a_slice_is_no_mask_however_dark_or_far_from_the_edge_of_a_page(name: str) -> None:
    image = make_slice(name, np.random.default_rng(0), size=128).image
    for other in (255 - image, image // 4):
        check_content(other, min_intensity_std=2.0)
    for picture in (image, decode_one(encode(image, "JPEG", quality=50))):
        for margin in (0, 30, 64, 128, 256):
            for grey in (0, 128, 255):
                page = np.pad(picture, margin, constant_values=grey)
                check_content(page, min_intensity_std=2.0)


@pytest.mark.real
def test_no_public_slice_is_a_mask(real_data: Path) -> None:
    paths = sorted(real_data.glob("T*ing/*/*"))[::20]
    for path in paths:
        image = decode_file(path.read_bytes(), dataclasses.replace(OPTIONS, max_pixels=10**8))[
            0
        ].image
        check_content(image, min_intensity_std=2.0)
        check_content(np.pad(image, max(image.shape), constant_values=255), min_intensity_std=2.0)
    assert len(paths) > 100


def test_the_commonest_reasons_tell_what_to_do() -> None:
    rejections: list[tuple[str, str | None]] = [("too small", ""), ("too small", "8 x 8 pixels")]
    rejections += [("unsupported transfer syntax", "JPEG 2000: needs: pip install x")] * 3
    rejections += [("blank", None), ("rare", "")]
    assert commonest_reasons(rejections) == (
        "unsupported transfer syntax (3; JPEG 2000: needs: pip install x), "
        "too small (2; 8 x 8 pixels), blank (1)"
    )


def test_decoders_are_silenced_for_one_thread_at_a_time() -> None:
    """The level of a logger and the filters of warnings are those of the whole process."""
    entered = threading.Event()

    def decode_too() -> None:
        with decode._silenced("pydicom"):
            entered.set()

    other = threading.Thread(target=decode_too)
    before = logging.getLogger("pydicom").level
    with decode._silenced("pydicom"):
        other.start()
        assert not entered.wait(0.2)
    other.join(5)
    assert entered.is_set()
    assert logging.getLogger("pydicom").level == before
