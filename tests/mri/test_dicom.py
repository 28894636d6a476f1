"""DICOM files become windowed slices; nothing of whom they are of leaves the module."""

import dataclasses
import io
import logging
import random
import struct
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from brainray.mri.decode import decode_file, sniff
from brainray.mri.slices import DecodedSlice, DecodeOptions, RejectedImage
from tests.mri import decoding

OPTIONS = dataclasses.replace(decoding.OPTIONS, max_voxels=2_000_000)
# (32, 48), 0..4059, smooth enough for lossy compression
RAMP = (np.add.outer(np.arange(32), np.arange(48)) * 52).astype(np.uint16)


def make_dicom(
    pixels: np.ndarray,
    *,
    syntax: str = uid.ExplicitVRLittleEndian,
    streams: Sequence[bytes | bytearray | memoryview] | None = None,
    **attributes: Any,
) -> bytes:
    """A file of frames (H, W), (T, H, W) or (H, W, 3); `streams` are its compressed frames."""
    is_colour = pixels.shape[-1] == 3
    frame_axes = 3 if is_colour else 2
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = uid.MRImageStorage
    meta.MediaStorageSOPInstanceUID = uid.UID("1.2.3.4")
    meta.TransferSyntaxUID = uid.UID(syntax)
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = uid.MRImageStorage
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.Modality = "MR"
    dataset.Rows, dataset.Columns = pixels.shape[-frame_axes:][:2]
    if pixels.ndim > frame_axes:
        dataset.NumberOfFrames = len(pixels)
    dataset.SamplesPerPixel = 3 if is_colour else 1
    dataset.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    if is_colour:
        dataset.PlanarConfiguration = 0
    bits = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = (
        pixels.tobytes() if streams is None else encapsulate([bytes(one) for one in streams])
    )
    dataset["PixelData"].VR = "OB" if bits == 8 or streams is not None else "OW"
    for name, value in attributes.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def decode_one(content: bytes) -> DecodedSlice:
    (decoded,) = decode_file(content, OPTIONS)
    assert decoded.format == "DICOM"
    assert decoded.frame == ""
    return decoded


def rejection_of(content: bytes, options: DecodeOptions = OPTIONS) -> RejectedImage:
    with pytest.raises(RejectedImage) as rejection:
        decode_file(content, options)
    return rejection.value


def to_range(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((values.astype(np.float64) - low) / (high - low), 0.0, 1.0) * 255.0


def test_a_mosaic_of_slices_is_no_slice() -> None:
    content = make_dicom(RAMP, ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"])
    assert rejection_of(content).reason == "no scan"


def test_bits_that_pydicom_would_not_read_are_refused() -> None:
    content = make_dicom(RAMP << 4, BitsStored=12, HighBit=15)
    assert str(rejection_of(content)).startswith("unsupported data type: pixels are not stored")
    assert decode_one(make_dicom(RAMP, BitsStored=12, HighBit=11)).image.max() == 255


@pytest.mark.parametrize(
    ("dtype", "held", "vr", "written"),
    [(np.uint16, 63536, "SS", -2000), (np.int16, -2000, "US", 63536)],
)
def test_padding_is_known_whatever_its_sign(
    dtype: type[np.generic], held: int, vr: str, written: int
) -> None:
    padded, dark = RAMP.astype(dtype), RAMP.astype(dtype)
    padded[:8], dark[:8] = held, RAMP[8:].min()
    expected = decode_one(make_dicom(dark)).image
    for syntax in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian):
        content = with_padding(make_dicom(padded, syntax=syntax), vr, PixelPaddingValue=written)
        np.testing.assert_array_equal(decode_one(content).image, expected)


def test_a_range_of_padding_around_zero_takes_no_more_than_zero() -> None:
    padded = RAMP + 1000
    padded[:8] = 0
    crossing, zero = (
        decode_one(with_padding(make_dicom(padded), **tags)).image
        for tags in (
            {"PixelPaddingValue": -1024, "PixelPaddingRangeLimit": 0},
            {"PixelPaddingValue": 0},
        )
    )
    np.testing.assert_array_equal(crossing, zero)
    assert not np.array_equal(zero, decode_one(make_dicom(padded)).image)


def with_padding(content: bytes, vr: str = "SS", /, **values: int) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(content))
    for name, value in values.items():
        dataset.add_new(pydicom.datadict.tag_for_keyword(name) or 0, vr, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


# --- Intensities ---------------------------------------------------------------------------------


def test_window_and_rescale_follow_the_standard() -> None:
    content = make_dicom(
        RAMP, WindowCenter=[1500, 9], WindowWidth=[1001, 9], RescaleSlope=2, RescaleIntercept=-1024
    )
    # PS3.3 C.11.2.1.2.1: from centre - 0.5 - (width - 1) / 2 to centre - 0.5 + (width - 1) / 2
    expected = to_range(RAMP * 2.0 - 1024.0, 999.5, 1999.5)
    image = decode_one(content).image
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image, expected, atol=0.51)
    assert ((image > 0) & (image < 255)).any()


def test_exact_and_sigmoid_windows_follow_the_standard() -> None:
    window: dict[str, Any] = {"WindowCenter": 2000, "WindowWidth": 1000}
    exact = decode_one(make_dicom(RAMP, VOILUTFunction="LINEAR_EXACT", **window)).image
    np.testing.assert_allclose(exact, to_range(RAMP, 1500, 2500), atol=0.51)
    sigmoid = decode_one(make_dicom(RAMP, VOILUTFunction="SIGMOID", **window)).image
    expected = 255.0 / (1.0 + np.exp(-4.0 * (RAMP - 2000.0) / 1000.0))
    np.testing.assert_allclose(sigmoid, expected, atol=0.51)


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"WindowCenter": 1000, "WindowWidth": 0},
        {"WindowCenter": ["", 9], "WindowWidth": [1000, 9]},
        {"WindowCenter": 1000, "WindowWidth": -5},
        {"WindowCenter": 1e7, "WindowWidth": 100},  # all black
    ],
)
def test_without_a_usable_window_foreground_percentiles_span_the_range(
    window: dict[str, Any],
) -> None:
    background = np.zeros((64, 64), np.int16)
    background[16:48, 16:48] = RAMP[:32, :32] + 500
    image = decode_one(make_dicom(background, **window)).image
    low, high = np.percentile(background[16:48, 16:48], OPTIONS.window_percentiles)
    np.testing.assert_allclose(image, to_range(background, low, high), atol=0.51)


@pytest.mark.parametrize("num_entries", [2**12, 2**16])  # of which 2^16 is written as 0
def test_a_lookup_table_stands_in_for_a_window(num_entries: int) -> None:
    table = Dataset()
    table.LUTDescriptor = [num_entries % 2**16, 0, 16]
    entries = (255 - np.arange(num_entries) * 256 // num_entries) * 257
    table.LUTData = entries.astype(np.uint16).tobytes()
    table["LUTData"].VR = "OW"
    pixels = RAMP * np.uint16(num_entries // 2**12)
    image = decode_one(make_dicom(pixels, VOILUTSequence=[table])).image
    np.testing.assert_array_equal(image, 255 - RAMP // 16)


@pytest.mark.parametrize(("num_entries", "lowest"), [(4096, 0), (256, 500)])
def test_a_lookup_table_of_eight_bits_takes_any_number_of_values(
    num_entries: int, lowest: int
) -> None:
    """Values below and above it are as its first and last entry."""
    table = Dataset()
    table.LUTDescriptor = [num_entries, lowest, 8]
    entries = np.arange(num_entries) * 256 // num_entries
    table.LUTData = entries.astype(np.uint16).tobytes()
    table["LUTData"].VR = "OW"
    image = decode_one(make_dicom(RAMP, VOILUTSequence=[table])).image
    expected = entries[np.clip(RAMP.astype(int) - lowest, 0, num_entries - 1)]
    np.testing.assert_array_equal(image, expected)


def test_a_lookup_table_of_eight_bits_may_be_stored_as_bytes() -> None:
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 8]
    entries = 255 - np.arange(4096) // 16
    table.LUTData = entries.astype(np.uint8).tobytes()
    table["LUTData"].VR = "OW"
    pixels = np.stack([RAMP, RAMP])  # the frames share the table
    slices = decode_file(make_dicom(pixels, VOILUTSequence=[table]), OPTIONS)
    for decoded in slices:
        np.testing.assert_array_equal(decoded.image, entries[RAMP])


def test_values_far_from_zero_keep_their_greys() -> None:
    near = decode_one(make_dicom(RAMP.astype(np.uint32))).image
    far = decode_one(make_dicom(RAMP.astype(np.uint32) + 2**30)).image
    np.testing.assert_array_equal(far, near)


def test_monochrome1_is_inverted() -> None:
    window: dict[str, Any] = {"WindowCenter": 1000, "WindowWidth": 2000}
    plain = decode_one(make_dicom(RAMP, **window)).image
    inverted = decode_one(make_dicom(RAMP, PhotometricInterpretation="MONOCHROME1", **window)).image
    np.testing.assert_array_equal(inverted, 255 - plain)


def test_monochrome1_without_a_window_is_as_the_same_picture_in_monochrome2() -> None:
    picture = np.zeros((64, 64), np.uint16)
    picture[16:48, 16:48] = RAMP[:32, :32] + 500
    plain = decode_one(make_dicom(picture)).image
    stored = picture.max() - picture
    inverted = decode_one(make_dicom(stored, PhotometricInterpretation="MONOCHROME1")).image
    np.testing.assert_array_equal(inverted, plain)


def test_an_empty_rescale_changes_nothing() -> None:
    plain = decode_one(make_dicom(RAMP)).image
    empty = decode_one(make_dicom(RAMP, RescaleSlope=None, RescaleIntercept=None)).image
    np.testing.assert_array_equal(empty, plain)
    zero = decode_one(make_dicom(RAMP, RescaleSlope=0, RescaleIntercept=7)).image
    np.testing.assert_array_equal(zero, plain)


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_dark_whatever_its_value(interpretation: str) -> None:
    picture = np.zeros((64, 64), np.uint16)
    picture[16:48, 16:48] = RAMP[:32, :32] + 500
    kind: dict[str, Any] = {"PhotometricInterpretation": interpretation}
    stored = picture.max() - picture if interpretation == "MONOCHROME1" else picture
    plain = decode_one(make_dicom(stored, **kind)).image
    padded = stored.copy()
    padded[:, :4] = 65000
    shown = decode_one(make_dicom(padded, PixelPaddingValue=65000, **kind)).image
    np.testing.assert_array_equal(shown, plain)
    limits: dict[str, Any] = {"PixelPaddingValue": 64000, "PixelPaddingRangeLimit": 65535}
    np.testing.assert_array_equal(decode_one(make_dicom(padded, **limits, **kind)).image, plain)


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_in_place_of_all_air_is_black_in_a_window(interpretation: str) -> None:
    picture = np.full((64, 64), 500, np.uint16)
    picture[16:48, 16:48] = RAMP[:32, :32] + 500
    is_padding = picture == 500
    stored = 5000 - picture if interpretation == "MONOCHROME1" else picture
    window = {"WindowCenter": 2500, "WindowWidth": 6000}
    kind: dict[str, Any] = {"PhotometricInterpretation": interpretation, **window}
    plain = decode_one(make_dicom(stored, **kind)).image
    assert plain[is_padding].min() > 0
    stored[is_padding] = 65000
    shown = decode_one(make_dicom(stored, PixelPaddingValue=65000, **kind)).image
    np.testing.assert_array_equal(shown, np.where(is_padding, 0, plain))


def test_a_palette_of_8_bits_in_words_is_no_blank_picture() -> None:
    indices = np.tile(np.arange(48, dtype=np.uint8), (32, 1))
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [48, 0, 16]
        table = np.arange(0, 240, 5, dtype=np.uint16).tobytes()
        palette[f"{colour}PaletteColorLookupTableData"] = table
    image = decode_one(make_dicom(indices, **palette)).image
    np.testing.assert_array_equal(image, indices * 5)


def test_colours_become_luminance() -> None:
    colours = np.zeros((16, 48, 3), np.uint8)
    for channel in range(3):
        colours[:, channel * 16 : channel * 16 + 16, channel] = 255
    expected = np.repeat(np.array([76, 149, 29], np.uint8), 16)  # ITU-R 601
    image = decode_one(make_dicom(colours)).image
    np.testing.assert_allclose(image, np.tile(expected, (16, 1)), atol=1)
    deep = decode_one(make_dicom(colours.astype(np.uint16) * 257)).image
    np.testing.assert_array_equal(deep, image)
    twelve_bits = np.where(colours, 4095, 0).astype(np.uint16)
    deep = decode_one(make_dicom(twelve_bits, BitsStored=12, HighBit=11)).image
    np.testing.assert_array_equal(deep, image)


def test_pixels_are_made_square() -> None:
    assert decode_one(make_dicom(RAMP, PixelSpacing=[2.0, 1.0])).image.shape == (64, 48)
    assert decode_one(make_dicom(RAMP, PixelSpacing=[0.5, 1.0])).image.shape == (32, 96)
    assert decode_one(make_dicom(RAMP, PixelSpacing=[1.0, 1.2])).image.shape == (32, 58)
    assert decode_one(make_dicom(RAMP, PixelSpacing=[1.05, 1.0])).image.shape == (34, 48)
    assert decode_one(make_dicom(RAMP, PixelSpacing=[1.0, 1.02])).image.shape == (32, 48)
    assert decode_one(make_dicom(RAMP, PixelAspectRatio=[2, 1])).image.shape == (64, 48)
    assert rejection_of(make_dicom(RAMP, PixelSpacing=[1e-9, 1.0])).reason == "too large"


# --- Frames --------------------------------------------------------------------------------------


def test_every_frame_is_a_slice_of_one_subject() -> None:
    frames = np.stack([RAMP, RAMP[::-1], RAMP // 2])
    decoded = decode_file(
        make_dicom(frames, PatientID="7", WindowCenter=2e3, WindowWidth=4e3), OPTIONS
    )
    assert [one.frame for one in decoded] == ["frame=0", "frame=1", "frame=2"]
    assert len({one.subject_id for one in decoded}) == 1
    np.testing.assert_array_equal(decoded[1].image, decoded[0].image[::-1])
    assert decoded[2].image.max() < decoded[0].image.max()


def test_enhanced_files_state_the_window_by_frame() -> None:
    groups = []
    for centre in (1000, 3000):
        voi = Dataset()
        voi.WindowCenter, voi.WindowWidth = centre, 1001
        group = Dataset()
        group.FrameVOILUTSequence = [voi]
        groups.append(group)
    measures = Dataset()
    measures.PixelSpacing = [2.0, 1.0]
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    content = make_dicom(
        np.stack([RAMP, RAMP]),
        PerFrameFunctionalGroupsSequence=groups,
        SharedFunctionalGroupsSequence=[shared],
    )
    first, second = decode_file(content, OPTIONS)
    assert first.image.shape == second.image.shape == (64, 48)
    # Every second row is half a row away from a stored one: intensities are compared, not places.
    assert (first.image == 255).mean() > 0.5 > (second.image == 255).mean()
    assert (second.image == 0).mean() > 0.5 > (first.image == 0).mean()


def test_frames_that_the_window_leaves_constant_are_rejected_unless_all_are() -> None:
    air = np.random.default_rng(0).rayleigh(12.0, RAMP.shape).astype(np.uint16)
    frames = np.stack([air, RAMP + 500, air])
    decoded = decode_file(make_dicom(frames, WindowCenter=2000, WindowWidth=3001), OPTIONS)
    reasons = {one.frame: str(one.rejection or "") for one in decoded}
    why = "blank: constant in the file's window"
    assert reasons == {"frame=1": "", "frame=0": why, "frame=2": why}
    # A window in other units than the pixels says nothing about any frame.
    decoded = decode_file(make_dicom(frames, WindowCenter=1e7, WindowWidth=100), OPTIONS)
    assert [one.frame for one in decoded] == ["frame=0", "frame=1", "frame=2"]
    assert all(one.image.std() > 10 and one.rejection is None for one in decoded)


def test_a_file_without_preamble_is_read() -> None:
    content = make_dicom(RAMP, syntax=uid.ImplicitVRLittleEndian)
    bare = content[content.index(b"\x08\x00\x16\x00") :]
    assert sniff(bare) == "DICOM"
    np.testing.assert_array_equal(decode_one(bare).image, decode_one(content).image)


# --- Transfer syntaxes ---------------------------------------------------------------------------


def compressed(syntax: uid.UID, pixels: np.ndarray) -> bytes:
    if syntax == uid.RLELossless:
        dataset = pydicom.dcmread(io.BytesIO(make_dicom(pixels)))
        dataset.compress(uid.RLELossless, generate_instance_uid=False)
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        return buffer.getvalue()
    encoders = {
        uid.JPEGBaseline8Bit: lambda: imagecodecs.jpeg8_encode(pixels, level=98),
        uid.JPEGExtended12Bit: lambda: imagecodecs.jpeg8_encode(pixels, 98, bitspersample=12),
        uid.JPEGLosslessSV1: lambda: imagecodecs.jpeg8_encode(
            pixels, lossless=True, predictor=1, bitspersample=8 * pixels.dtype.itemsize
        ),
        uid.JPEGLossless: lambda: imagecodecs.jpeg8_encode(
            pixels, lossless=True, predictor=4, bitspersample=8 * pixels.dtype.itemsize
        ),
        uid.JPEGLSLossless: lambda: imagecodecs.jpegls_encode(pixels),
        uid.JPEGLSNearLossless: lambda: imagecodecs.jpegls_encode(pixels, level=2),
        uid.JPEG2000Lossless: lambda: imagecodecs.jpeg2k_encode(
            pixels, codecformat="j2k", reversible=True
        ),
        uid.JPEG2000: lambda: imagecodecs.jpeg2k_encode(pixels, level=90, codecformat="j2k"),
    }
    return make_dicom(pixels, syntax=syntax, streams=[encoders[syntax]()])


LOSSLESS = [
    uid.RLELossless,
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
]
LOSSY = [uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000]


@pytest.mark.parametrize("syntax", [*LOSSLESS, *LOSSY], ids=lambda syntax: syntax.keyword)
def test_compressed_pixels_are_those_of_the_uncompressed_file(syntax: uid.UID) -> None:
    pixels = (RAMP // 16).astype(np.uint8) if syntax == uid.JPEGBaseline8Bit else RAMP
    image = decode_one(compressed(syntax, pixels)).image
    difference = image.astype(int) - decode_one(make_dicom(pixels)).image
    assert np.abs(difference).max() <= (0 if syntax in LOSSLESS else 4)


@pytest.mark.parametrize("syntax", [uid.JPEGLosslessSV1, uid.JPEGLSLossless])
def test_negative_values_survive_codecs_that_know_no_sign(syntax: uid.UID) -> None:
    signed = RAMP.astype(np.int16) - 2000
    content = compressed(syntax, signed.view(np.uint16))
    dataset = pydicom.dcmread(io.BytesIO(content))
    dataset.PixelRepresentation = 1
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    np.testing.assert_array_equal(
        decode_one(buffer.getvalue()).image, decode_one(make_dicom(signed)).image
    )


def test_a_jpeg2000_picture_need_not_begin_at_the_origin_of_its_canvas() -> None:
    stream = bytearray(imagecodecs.jpeg2k_encode(RAMP, codecformat="j2k", reversible=True))
    width, height, *_ = struct.unpack_from(">2I", stream, 8)
    there = 2**14  # a multiple of the sides of all code blocks
    struct.pack_into(">4I", stream, 8, width + there, height + there, there, there)
    struct.pack_into(">2I", stream, 32, there, there)  # the first tile
    image = decode_one(make_dicom(RAMP, syntax=uid.JPEG2000Lossless, streams=[stream])).image
    np.testing.assert_array_equal(image, decode_one(make_dicom(RAMP)).image)


@pytest.mark.parametrize("interpretation", ["RGB", "YBR_FULL_422"])
def test_jpeg_colours_are_read_as_the_header_says(interpretation: str) -> None:
    colours = np.full((32, 48, 3), (200, 100, 50), np.uint8)
    space = "RGB" if interpretation == "RGB" else "YCBCR"
    stream = imagecodecs.jpeg8_encode(colours, 98, colorspace="RGB", outcolorspace=space)
    content = make_dicom(
        colours,
        syntax=uid.JPEGBaseline8Bit,
        streams=[stream],
        PhotometricInterpretation=interpretation,
    )
    luminance = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    np.testing.assert_allclose(decode_one(content).image, luminance, atol=2)


@pytest.mark.parametrize(
    ("interpretation", "transformed"), [("YBR_FULL", False), ("YBR_RCT", True), ("RGB", False)]
)
def test_jpeg2000_colours_are_those_of_its_component_transform(
    interpretation: str, transformed: bool
) -> None:
    greys = np.repeat((RAMP // 16).astype(np.uint8)[..., None], 3, axis=2)
    stored = greys.copy()
    if interpretation == "YBR_FULL":
        stored[..., 1:] = 128  # of greys
    stream = imagecodecs.jpeg2k_encode(
        stored, codecformat="j2k", reversible=True, mct=transformed, colorspace="SRGB"
    )
    content = make_dicom(
        stored,
        syntax=uid.JPEG2000Lossless,
        streams=[stream],
        PhotometricInterpretation=interpretation,
    )
    np.testing.assert_allclose(decode_one(content).image, greys[..., 0], atol=1)


def test_a_missing_plug_in_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    content = compressed(uid.JPEGLosslessSV1, RAMP)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rejection = rejection_of(content)
    assert rejection.reason == "unsupported transfer syntax"
    assert uid.JPEGLosslessSV1.name in rejection.detail
    assert "pip install imagecodecs" in rejection.detail


@pytest.mark.parametrize("syntax", [uid.MPEG2MPML, uid.DeflatedExplicitVRLittleEndian])
def test_other_transfer_syntaxes_are_refused(syntax: uid.UID) -> None:
    if syntax == uid.MPEG2MPML:
        content = make_dicom(RAMP, syntax=syntax, streams=[b"\0" * 64])
    else:
        content = make_dicom(RAMP, syntax=syntax)
    rejection = rejection_of(content)
    assert rejection.reason == "unsupported transfer syntax"
    assert syntax.name in rejection.detail


# --- Subjects and privacy ------------------------------------------------------------------------


def subject_of(options: DecodeOptions = OPTIONS, **attributes: Any) -> str | None:
    return decode_file(make_dicom(RAMP, **attributes), options)[0].subject_id


def test_the_study_is_known_whether_or_not_the_patient_is() -> None:
    named = decode_one(make_dicom(RAMP, PatientID="1234", StudyInstanceUID="1.1"))
    nameless = decode_one(make_dicom(RAMP, StudyInstanceUID="1.1"))
    assert named.study_id == nameless.study_id == nameless.subject_id != named.subject_id
    assert decode_one(make_dicom(RAMP, SeriesInstanceUID="1.1")).study_id is None
    assert named.study_id is not None
    # A patient who is called like a study is no study.
    assert subject_of(PatientID="1.1") != named.study_id.removeprefix("study-")


def test_one_patient_is_one_subject_over_all_studies_and_series() -> None:
    first = subject_of(PatientID="1234", StudyInstanceUID="1.1", SeriesInstanceUID="1.1.1")
    assert first == subject_of(PatientID="1234 ", StudyInstanceUID="1.2", SeriesInstanceUID="1.2.1")
    assert first != subject_of(PatientID="1235", StudyInstanceUID="1.1", SeriesInstanceUID="1.1.1")
    assert first != subject_of(
        dataclasses.replace(OPTIONS, salt=b"another"),
        PatientID="1234",
    )
    assert first is not None
    assert subject_of(PatientID="patient_000") != subject_of(PatientID="patient_001")
    assert subject_of(PatientID="X") is not None
    assert len(first) == 32
    assert int(first, 16)


PLACEHOLDERS = ["", "  ", "ANONYMOUS", "Unknown", "000", "0000-0000", "XX-XX", "null", "-"]


@pytest.mark.parametrize("patient", PLACEHOLDERS)
def test_without_a_patient_the_study_is_the_subject_then_the_series(patient: str) -> None:
    study = subject_of(PatientID=patient, StudyInstanceUID="1.1", SeriesInstanceUID="1.1.1")
    assert study == subject_of(StudyInstanceUID="1.1", SeriesInstanceUID="1.1.2")
    series = subject_of(PatientID=patient, SeriesInstanceUID="1.1.1")
    assert series == subject_of(SeriesInstanceUID="1.1.1")
    assert len({study, series, None}) == 3
    assert study is not None
    assert study.startswith("study-")  # a patient may have several
    assert subject_of(PatientID=patient) is None
    frames = decode_file(make_dicom(np.stack([RAMP, RAMP.T.reshape(RAMP.shape)])), OPTIONS)
    assert len({one.subject_id for one in frames} - {None}) == 1


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
@pytest.mark.parametrize("study", ["REMOVED", "ANON", "0", "0.0"])
def test_a_study_without_a_number_is_none(study: str) -> None:
    one = decode_one(make_dicom(RAMP, StudyInstanceUID=study, SeriesInstanceUID="1.1.1"))
    assert one.study_id is None
    assert one.subject_id == subject_of(SeriesInstanceUID="1.1.1")


SECRETS: dict[str, str] = {
    "PatientName": "Quaxnamov^Ilse",
    "PatientID": "QX778899",
    "PatientBirthDate": "19570313",
    "PatientAddress": "Quaxallee 17",
    "OtherPatientIDs": "QXOTHER55",
    "StudyDate": "20190827",
    "StudyTime": "142233",
    "SeriesDate": "20190828",
    "AcquisitionDateTime": "20190829101112",
    "InstitutionName": "Quaxklinik",
    "ReferringPhysicianName": "Quaxarzt^Udo",
    "AccessionNumber": "QXACC4711",
    "StudyDescription": "Quaxstudie",
    "ImageComments": "Quaxkommentar",
    "StudyInstanceUID": "1.2.826.0.1.5550001",
    "SeriesInstanceUID": "1.2.826.0.1.5550002",
    "FrameOfReferenceUID": "1.2.826.0.1.5550003",
    "SOPInstanceUID": "1.2.826.0.1.5550004",
    "DeviceSerialNumber": "QXSER31337",
}
PLACEHOLDER = "11111111"
NAME_AS_VALUE = "QXDOEJAN"  # as long as the placeholder


def with_secrets(**attributes: Any) -> bytes:
    return make_dicom(RAMP, **(SECRETS | attributes))


def name_in_a_number(content: bytes) -> bytes:
    assert PLACEHOLDER.encode() in content
    return content.replace(PLACEHOLDER.encode(), NAME_AS_VALUE.encode())


def without_pixels() -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(with_secrets()))
    del dataset.PixelData
    del dataset.Rows
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


LEAK_CASES = {
    "whole": with_secrets,
    "truncated pixels": lambda: with_secrets()[:-200],
    "truncated header": lambda: with_secrets()[:700],
    "no pixels": without_pixels,
    "a name for a window": lambda: name_in_a_number(
        with_secrets(WindowCenter=PLACEHOLDER, WindowWidth=PLACEHOLDER)
    ),
    "a name for a slope": lambda: name_in_a_number(
        with_secrets(RescaleSlope=PLACEHOLDER, RescaleIntercept="0")
    ),
    "a name for frames": lambda: name_in_a_number(with_secrets(NumberOfFrames=PLACEHOLDER)),
    "a name for a syntax": lambda: with_secrets().replace(
        b"1.2.840.10008.1.2.1\0", b"Quaxnamov^Ilse.1.2.3"
    ),
    "a broken stream": lambda: make_dicom(
        RAMP, syntax=uid.JPEG2000, streams=[b"Quaxnamov^Ilse"], **SECRETS
    ),
    "too large": lambda: with_secrets(NumberOfFrames=100_000),
}


@pytest.mark.parametrize("case", LEAK_CASES)
def test_nothing_personal_is_returned_raised_logged_or_warned(
    case: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    content = LEAK_CASES[case]()
    seen = []
    capfd.readouterr()
    caplog.clear()
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            seen += [repr(dataclasses.asdict(one)) for one in decode_file(content, OPTIONS)]
            assert case == "whole"
        except RejectedImage as rejection:
            assert case != "whole"
            seen += [repr(rejection), rejection.reason, rejection.detail]
            seen += traceback.format_exception(rejection)
            # What a log handler or a debugger would still find.
            seen += [repr(rejection.__context__), repr(rejection.__cause__)]
    seen += [str(warning.message) for warning in warned]
    seen += [caplog.text, *capfd.readouterr()]
    for secret in [*SECRETS.values(), NAME_AS_VALUE, "Quax", "QX"]:
        assert not any(secret.lower() in text.lower() for text in seen), secret


def test_pydicom_alone_would_have_leaked() -> None:
    # The control of the test above: the same file, read without our care.
    content = LEAK_CASES["a name for a window"]()
    with pytest.raises(ValueError, match=NAME_AS_VALUE):
        float(pydicom.dcmread(io.BytesIO(content)).WindowCenter)


def test_loggers_speak_again_afterwards() -> None:
    level = logging.getLogger("pydicom").level
    rejection_of(with_secrets()[:-200])
    assert logging.getLogger("pydicom").level == level


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_pixels_that_show_the_patient_or_no_scan_are_refused() -> None:
    burned = make_dicom(RAMP, BurnedInAnnotation="YES")
    assert rejection_of(burned).reason == "burned-in annotation"
    for shown in (
        {"BurnedInAnnotation": "Yes"},
        {"ImageType": ["DERIVED", "OTHER", "SCREEN SAVE"]},
    ):
        assert rejection_of(make_dicom(RAMP, **shown)).reason == "burned-in annotation"
    assert decode_one(make_dicom(RAMP, BurnedInAnnotation="NO"))
    assert rejection_of(make_dicom(RAMP, Modality="SEG")).reason == "no scan"
    assert rejection_of(without_pixels()).reason == "no pixel data"


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"Rows": 60_000, "Columns": 60_000}, "too large"),
        ({"NumberOfFrames": 2_000_000_000}, "too large"),
        ({"Rows": 0}, "too small"),
        ({"NumberOfFrames": -3}, "corrupt or truncated"),
        ({"NumberOfFrames": 2}, "corrupt or truncated"),
        ({"SamplesPerPixel": 65_535}, "corrupt or truncated"),
        ({"BitsAllocated": 7}, "corrupt or truncated"),
        ({"Rows": 33}, "corrupt or truncated"),
    ],
)
def test_absurd_headers_are_refused(attributes: dict[str, Any], reason: str) -> None:
    assert rejection_of(make_dicom(RAMP, **attributes)).reason == reason


def test_a_small_header_over_a_large_stream_is_refused_before_decoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vast = np.zeros((4096, 4096), np.uint8)
    streams = {
        uid.JPEGBaseline8Bit: imagecodecs.jpeg8_encode(vast),
        uid.JPEGLSLossless: imagecodecs.jpegls_encode(vast),
        uid.JPEG2000Lossless: imagecodecs.jpeg2k_encode(vast[:512, :512], codecformat="j2k"),
    }
    small = np.zeros((32, 32), np.uint8)
    decoded: list[object] = []

    def decode(stream: bytes, **_: object) -> np.ndarray:
        decoded.append(stream)
        return small

    for name in ("jpeg8_decode", "jpegls_decode", "jpeg2k_decode"):
        monkeypatch.setattr(imagecodecs, name, decode)
    for syntax, stream in streams.items():
        content = make_dicom(small, syntax=syntax, streams=[stream])
        assert rejection_of(content).reason == "corrupt or truncated"
    assert not decoded


def test_a_jpeg_ls_stream_without_its_end_does_not_hang() -> None:
    stream = imagecodecs.jpegls_encode(RAMP)
    for length in range(60, len(stream) - 2, 7):
        rejection_of(make_dicom(RAMP, syntax=uid.JPEGLSLossless, streams=[stream[:length]]))


@pytest.mark.parametrize(
    "syntax", [uid.ExplicitVRLittleEndian, *LOSSLESS, uid.JPEGBaseline8Bit], ids=lambda u: u.keyword
)
def test_broken_bytes_are_decoded_or_rejected_and_nothing_else(syntax: uid.UID) -> None:
    pixels = (RAMP // 16).astype(np.uint8)
    secrets: dict[str, Any] = {"PatientID": "1", "WindowCenter": 99, "WindowWidth": 99}
    if syntax == uid.ExplicitVRLittleEndian:
        original = make_dicom(pixels, **secrets)
    else:
        original = compressed(syntax, pixels)
    dice = random.Random(str(syntax))
    rejected = 0
    for _ in range(100):
        changed = bytearray(original)
        if dice.random() < 0.2:
            del changed[dice.randrange(140, len(changed)) :]
        for _ in range(dice.choice((1, 2, 8))):
            changed[dice.randrange(132, len(changed))] = dice.randrange(256)
        try:
            for one in decode_file(bytes(changed), OPTIONS):
                assert one.image.dtype == np.uint8
        except RejectedImage:
            rejected += 1
    assert rejected
