"""NIfTI volumes become slices in display order; absurd ones are refused before unpacking."""

import dataclasses
import gzip
import logging
import random
import tracemalloc
from typing import Literal

import nibabel
import numpy as np
import pytest

from brainray.mri.decode import decode_file
from brainray.mri.slices import DecodedSlice, DecodeOptions, RejectedImage
from tests.mri import decoding

OPTIONS = dataclasses.replace(decoding.OPTIONS, min_side=8)
Axis = Literal["axial", "coronal", "sagittal"]


def ball(shape: tuple[int, int, int] = (24, 28, 20)) -> np.ndarray:
    """(X, Y, Z) towards right, front and top: a head of uneven brightness in black air."""
    x, y, z = np.meshgrid(*(np.linspace(-1.0, 1.0, side) for side in shape), indexing="ij")
    inside = x**2 + y**2 + z**2 < 0.8
    return np.where(inside, 600.0 + 100.0 * x + 50.0 * y + 25.0 * z, 0.0).astype(np.float32)


def make_nifti(
    volume: np.ndarray,
    *,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    axes: str = "RAS",
    version: int = 1,
    endianness: str = "<",
) -> bytes:
    """A file of a volume whose voxels run towards right, front and top, stored along `axes`."""
    affine = np.diag([*spacing, 1.0])
    image_class = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    header = image_class.header_class(endianness=endianness)
    header.set_data_dtype(volume.dtype)
    image = image_class(volume, affine, header)
    wanted = nibabel.orientations.axcodes2ornt(axes)
    present = nibabel.orientations.axcodes2ornt("RAS")
    turned = image.as_reoriented(nibabel.orientations.ornt_transform(present, wanted))
    assert "".join(nibabel.aff2axcodes(turned.affine)) == axes
    return bytes(turned.to_bytes())


def slices_of(content: bytes, axis: Axis = "axial") -> list[DecodedSlice]:
    decoded = decode_file(content, dataclasses.replace(OPTIONS, axis=axis))
    assert {one.format for one in decoded} == {"NIfTI"}
    return decoded


def rejection_of(content: bytes, options: DecodeOptions = OPTIONS) -> RejectedImage:
    with pytest.raises(RejectedImage) as rejection:
        decode_file(content, options)
    return rejection.value


def with_header(content: bytes, offset: int, value: np.generic) -> bytes:
    stored = value.tobytes()
    return content[:offset] + stored + content[offset + len(stored) :]


# --- Geometry ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "place", "shape"),
    [
        # A light to the right, in front and on top: on the left and up in each plane, but for
        # the sagittal one, which faces left.
        ("axial", (3, 3), (28, 24)),
        ("coronal", (3, 3), (20, 24)),
        ("sagittal", (3, 3), (20, 28)),
    ],
)
def test_slices_are_shown_in_radiological_order(
    axis: Axis, place: tuple[int, int], shape: tuple[int, int]
) -> None:
    volume = np.full((24, 28, 20), 10.0, np.float32)
    volume[:12] = 20.0
    volume[12:] -= np.linspace(0.0, 1.0, 20, dtype=np.float32)  # of two greys it would be a mask
    volume[20, 24, 16] = 1000.0  # three voxels from the right, the front and the top
    index = {"sagittal": 20, "coronal": 24, "axial": 16}[axis]
    options = dataclasses.replace(OPTIONS, axis=axis, min_foreground=0.0)
    decoded = {one.frame: one.image for one in decode_file(make_nifti(volume), options)}
    image = decoded[f"volume=0/{axis}={index}"]
    assert image.shape == shape
    if axis != "sagittal":  # the patient's left half is brighter and shown on the right
        assert image[-1, -1] > image[-1, 0]
    assert image[place] == image.max()
    assert np.count_nonzero(image == image.max()) == 1


@pytest.mark.parametrize("axes", ["LPS", "LAS", "PIR", "SRA", "AIL"])
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_slices_do_not_depend_on_how_the_voxels_are_stored(axes: str, axis: Axis) -> None:
    spacing = (1.0, 1.5, 2.0)
    expected = slices_of(make_nifti(ball(), spacing=spacing), axis)
    found = slices_of(make_nifti(ball(), spacing=spacing, axes=axes), axis)
    assert [one.frame for one in found] == [one.frame for one in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


def test_pixels_are_made_square() -> None:
    content = make_nifti(ball(), spacing=(1.0, 1.0, 3.0))
    assert slices_of(content, "axial")[0].image.shape == (28, 24)
    assert slices_of(content, "coronal")[0].image.shape == (60, 24)
    assert slices_of(content, "sagittal")[0].image.shape == (60, 28)
    nearly = make_nifti(ball(), spacing=(1.0, 1.02, 1.0))
    assert slices_of(nearly)[0].image.shape == (28, 24)


def test_a_single_slice_is_shown_in_its_own_plane() -> None:
    volume = ball((24, 28, 3))[:, :, 1]
    for stored in (volume, volume[:, :, None], volume[:, :, None, None]):
        (decoded,) = slices_of(bytes(nibabel.Nifti1Image(stored, np.eye(4)).to_bytes()), "coronal")
        assert decoded.image.shape == (28, 24)
        assert decoded.frame == ""


def test_the_sform_comes_before_the_qform() -> None:
    image = nibabel.Nifti1Image(ball(), None)
    image.set_sform(np.diag([1.0, 1.0, 2.0, 1.0]), 1)
    image.set_qform(np.diag([1.0, 3.0, 1.0, 1.0]), 1)
    assert slices_of(bytes(image.to_bytes()), "coronal")[0].image.shape == (40, 24)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_broken_matrix_falls_back_to_voxel_sizes(value: float) -> None:
    content = make_nifti(ball(), spacing=(1.0, 1.0, 2.0))
    for offset in range(280, 328, 4):  # srow_x, srow_y, srow_z
        content = with_header(content, offset, np.float32(value))
    assert slices_of(content, "coronal")[0].image.shape == (40, 24)


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_versions_byte_orders_and_types_agree(
    version: int, endianness: str, dtype: type[np.generic]
) -> None:
    volume = np.round(ball() / 4.0)
    expected = slices_of(make_nifti(volume))
    stored = make_nifti(volume.astype(dtype), version=version, endianness=endianness)
    for content in (stored, gzip.compress(stored)):
        for one, other in zip(slices_of(content), expected, strict=True):
            np.testing.assert_array_equal(one.image, other.image)


def test_the_air_of_a_standardised_brain_is_dark() -> None:
    """Outside of the mask is 0, which lies amid the values inside."""
    raw = ball()
    inside = raw > 0
    standardised = np.where(inside, (raw - raw[inside].mean()) / raw[inside].std(), 0.0)
    shown = slices_of(make_nifti(standardised.astype(np.float32)))
    expected = slices_of(make_nifti(raw))
    assert [one.frame for one in shown] == [one.frame for one in expected]
    for one, other in zip(shown, expected, strict=True):
        assert one.image[0, 0] == 0
        inside = other.image > 0
        assert np.corrcoef(one.image[inside], other.image[inside])[0, 1] > 0.99


def test_bright_corners_of_a_cropped_head_are_no_air() -> None:
    volume = np.linspace(100, 900, 24 * 28 * 20, dtype=np.float32).reshape(24, 28, 20)
    ends = (0, 1, -2, -1)
    volume[np.ix_(ends, ends, ends)] = 1000.0
    (lowest,) = (one for one in slices_of(make_nifti(volume)) if one.frame.endswith("axial=0"))
    assert lowest.image[0, 0] == 255


def test_several_gzip_members_are_one_file() -> None:
    content = make_nifti(ball())
    members = b"".join(map(gzip.compress, (b"", content[:100], content[100:5000], content[5000:])))
    assert len(slices_of(members)) == len(slices_of(content))


def test_every_volume_of_a_series_is_sliced_with_its_own_window() -> None:
    first = ball()
    series = np.stack([first, 4.0 * first, np.zeros_like(first)], axis=3)
    decoded = slices_of(make_nifti(series))
    single = slices_of(make_nifti(first))
    frames = [one.frame for one in single]
    assert [one.frame for one in decoded] == frames + [
        frame.replace("volume=0", "volume=1") for frame in frames
    ]
    for one, other in zip(decoded, [*single, *single], strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    assert len({one.subject_id for one in decoded}) == 1


def test_a_file_is_a_subject() -> None:
    content = make_nifti(ball())
    (subject,) = {one.subject_id for one in slices_of(content)}
    assert subject is not None
    assert len(subject) == 32
    assert slices_of(make_nifti(ball() + 1.0))[0].subject_id != subject
    resalted = dataclasses.replace(OPTIONS, salt=b"another")
    assert decode_file(content, resalted)[0].subject_id != subject


def test_trailing_axes_of_one_are_ignored_and_others_refused() -> None:
    image = nibabel.Nifti1Image(ball()[..., None, None, None], np.eye(4))
    assert slices_of(bytes(image.to_bytes()))
    vectors = nibabel.Nifti1Image(np.stack([ball()] * 3, axis=3)[..., None, :], np.eye(4))
    assert rejection_of(bytes(vectors.to_bytes())).reason == "too many dimensions"


# --- Intensities ---------------------------------------------------------------------------------


def test_one_window_holds_for_all_slices_of_a_volume() -> None:
    volume = ball()
    low, high = np.percentile(volume[volume > 0], OPTIONS.window_percentiles)
    for one in slices_of(make_nifti(volume)):
        index = int(one.frame.rpartition("=")[2])
        plane = volume[::-1, ::-1, index].T
        expected = np.clip((plane - low) / (high - low), 0.0, 1.0) * 255.0
        np.testing.assert_allclose(one.image, expected, atol=0.51)


def test_a_few_hot_voxels_do_not_darken_the_rest() -> None:
    volume = ball()
    expected = slices_of(make_nifti(volume))
    volume[12, 14, 10] = 1e9
    for one, other in zip(slices_of(make_nifti(volume)), expected, strict=True):
        assert np.abs(one.image.astype(int) - other.image).mean() < 2.0


def test_slices_with_little_of_the_head_are_skipped() -> None:
    volume = ball()
    share = (volume > 0).mean(axis=(0, 1))
    kept = [int(one.frame.rpartition("=")[2]) for one in slices_of(make_nifti(volume))]
    assert kept == np.flatnonzero(share >= OPTIONS.min_foreground).tolist()
    assert 0 < len(kept) < volume.shape[2]


def test_noise_of_the_air_is_no_head() -> None:
    volume = ball()
    noise = np.random.default_rng(0).rayleigh(5.0, volume.shape).astype(np.float32)
    found, expected = (slices_of(make_nifti(each)) for each in (volume + noise, volume))
    assert [one.frame for one in found] == [one.frame for one in expected]


def test_few_broken_voxels_are_replaced_and_many_refused() -> None:
    volume = ball()
    expected = slices_of(make_nifti(volume))
    volume[0, 0, :3] = np.nan, np.inf, -np.inf  # in the air, where the minimum is
    for one, other in zip(slices_of(make_nifti(volume)), expected, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    for series in (volume[..., None], np.stack([volume, volume], axis=-1)):
        again = slices_of(make_nifti(series))
        for one, other in zip(again, expected * series.shape[3], strict=True):
            np.testing.assert_array_equal(one.image, other.image)
    air = volume <= np.median(volume)
    masked = slices_of(make_nifti(np.where(air, np.nan, volume)))  # as a brain that was cut out
    for one, other in zip(masked, expected, strict=True):
        assert (one.image[other.image == 0] == 0).all()
    assert max(one.image.max() for one in masked) == 255
    volume[:, :, 0] = np.inf
    assert rejection_of(make_nifti(volume)).reason == "non-finite pixels"
    assert rejection_of(make_nifti(np.full_like(volume, np.nan))).reason == "non-finite pixels"


def test_a_bad_volume_of_a_series_costs_no_other() -> None:
    bad = np.full_like(ball(), np.nan), (ball() > 0).astype(np.float32)
    decoded = slices_of(make_nifti(np.stack([bad[0], ball(), bad[1]], axis=3)))
    whole, rejected = decoded[:-2], decoded[-2:]
    for one, other in zip(whole, slices_of(make_nifti(ball())), strict=True):
        assert one.frame == other.frame.replace("volume=0", "volume=1")
        np.testing.assert_array_equal(one.image, other.image)
    found = [(one.frame, one.rejection and one.rejection.reason) for one in rejected]
    assert found == [("volume=0", "non-finite pixels"), ("volume=2", "no scan")]
    assert rejection_of(make_nifti(np.stack(bad, axis=3))).reason == "non-finite pixels"


@pytest.mark.parametrize("offset", [-2_000_000_000, 2_000_000_000])
def test_voxels_far_from_zero_keep_their_greys(offset: int) -> None:
    volume = ball().astype(np.int32)
    far = slices_of(make_nifti(volume + np.int32(offset)))
    for one, other in zip(far, slices_of(make_nifti(volume)), strict=True):
        np.testing.assert_array_equal(one.image, other.image)


def test_masks_and_maps_of_labels_are_no_scans() -> None:
    mask = (ball() > 0).astype(np.float32)
    labels = np.where(ball() > 600, 4, 1).astype(np.int16) * (ball() > 0)
    for volume in (mask, labels.astype(np.int16), labels.astype(np.float32)):
        rejection = rejection_of(make_nifti(volume))
        assert str(rejection) == "no scan: fewer than 16 greys: a mask or label map"
    label_map = with_header(make_nifti(ball()), 68, np.int16(1002))  # the intent
    assert rejection_of(label_map).reason == "no scan"


def test_where_the_sform_is_unusable_the_qform_holds() -> None:
    content = make_nifti(ball(), axes="PIR")
    expected = slices_of(content)
    broken = with_header(content, 252, np.int16(1))  # qform_code
    for offset in range(280, 328, 4):  # srow_x, srow_y and srow_z
        broken = with_header(broken, offset, np.float32(0))
    for one, other in zip(slices_of(broken), expected, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


def test_where_the_quaternions_are_too_long_the_voxel_sizes_hold() -> None:
    content = make_nifti(ball(), spacing=(1.0, 1.0, 2.0))
    expected = slices_of(content, "coronal")
    broken = with_header(content, 252, np.int16(1))  # qform_code
    broken = with_header(broken, 254, np.int16(0))  # sform_code
    for offset in range(256, 268, 4):  # quatern_b, quatern_c and quatern_d
        broken = with_header(broken, offset, np.float32(0.9))
    found = slices_of(broken, "coronal")
    assert [one.image.shape for one in found] == [one.image.shape for one in expected]


@pytest.mark.parametrize("value", [0.0, 7.0, -1e30])
def test_constant_volumes_are_blank(value: float) -> None:
    assert rejection_of(make_nifti(np.full((16, 16, 16), value, np.float32))).reason == "blank"


def test_complex_and_colour_voxels_are_refused() -> None:
    waves = nibabel.Nifti1Image(ball().astype(np.complex64), np.eye(4))
    assert rejection_of(bytes(waves.to_bytes())).reason == "unsupported data type"
    colours = np.zeros((16, 16, 16), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    image = nibabel.Nifti1Image(colours, np.eye(4))
    assert rejection_of(bytes(image.to_bytes())).reason == "unsupported data type"


# --- Hostile files -------------------------------------------------------------------------------


def peak_memory_of_rejecting(content: bytes) -> tuple[str, int]:
    rejection_of(b"warm up the imports")
    tracemalloc.start()
    try:
        reason = rejection_of(content).reason
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return reason, peak


def test_an_absurd_header_is_refused_before_unpacking() -> None:
    content = make_nifti(ball())
    for axis in range(3):
        content = with_header(content, 42 + 2 * axis, np.int16(32_000))
    for hostile in (content, gzip.compress(content)):
        reason, peak = peak_memory_of_rejecting(hostile)
        assert reason == "too large"
        assert peak < 5_000_000


def test_a_gzip_bomb_behind_a_modest_header_is_not_unpacked() -> None:
    bomb = gzip.compress(make_nifti(ball()) + bytes(100_000_000), compresslevel=1)
    assert len(bomb) < 1_000_000
    reason, peak = peak_memory_of_rejecting(bomb)
    assert reason == "corrupt or truncated"
    assert peak < 10_000_000


def test_truncated_or_altered_gzip_is_refused() -> None:
    content = gzip.compress(make_nifti(ball()))
    for length in (20, 200, len(content) // 2, len(content) - 1):
        assert rejection_of(content[:length]).reason in {"corrupt or truncated", "not an image"}
    checksum = len(content) - 8
    altered = content[:checksum] + bytes([content[checksum] ^ 1]) + content[checksum + 1 :]
    assert rejection_of(altered).reason == "corrupt or truncated"


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (40, np.int16(0), "corrupt or truncated"),
        (42, np.int16(-24), "corrupt or truncated"),
        (42, np.int16(0), "corrupt or truncated"),
        (46, np.int16(21), "corrupt or truncated"),  # one slice more than there is
        (70, np.int16(12_345), "corrupt or truncated"),  # data type
        (108, np.float32(1e30), "corrupt or truncated"),  # offset of the voxels
        (108, np.float32(np.nan), "corrupt or truncated"),
        (112, np.float32(1e38), "non-finite pixels"),  # slope
        (344, np.frombuffer(b"ni1\0", np.uint32)[0], "no pixel data"),
    ],
)
def test_impossible_headers_are_refused(offset: int, value: np.generic, reason: str) -> None:
    assert rejection_of(with_header(make_nifti(ball()), offset, value)).reason == reason


def test_a_long_series_is_read_volume_by_volume() -> None:
    series = np.stack([ball().astype(np.int16)] * 100, axis=3)
    content = make_nifti(series)
    decode_file(make_nifti(ball()), OPTIONS)  # imports
    tracemalloc.start()
    try:
        decoded = decode_file(content, OPTIONS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    result = sum(one.image.nbytes for one in decoded)
    # The series in double precision would be 8 bytes a voxel.
    assert peak - result < 3 * series.size


def test_nothing_of_the_header_is_leaked(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    image = nibabel.Nifti1Image(ball(), np.eye(4))
    image.header["db_name"] = b"Quaxnamov^Ilse"
    image.header["descrip"] = b"Quaxklinik 19570313"
    image.header["aux_file"] = b"Quaxdatei"
    content = bytes(image.to_bytes())
    capfd.readouterr()
    with caplog.at_level(logging.DEBUG):
        seen = [repr(decode_file(content, OPTIONS))]
        for hostile in (
            content[:-300],
            with_header(content, 252, np.int16(-7)),
            with_header(content, 70, np.int16(12_345)),
            with_header(content, 0, np.int32(11)),
        ):
            try:
                seen.append(repr(decode_file(hostile, OPTIONS)))
            except RejectedImage as rejection:
                seen += [repr(rejection), repr(rejection.__context__)]
    seen += [caplog.text, *capfd.readouterr()]
    assert not any("quax" in text.lower() or "1957" in text for text in seen)


@pytest.mark.parametrize("compressed", [False, True])
def test_broken_bytes_are_decoded_or_rejected_and_nothing_else(compressed: bool) -> None:
    original = make_nifti(ball())
    dice = random.Random(5)
    rejected = 0
    for _ in range(150):
        changed = bytearray(original)
        for _ in range(dice.choice((1, 2, 8))):
            changed[dice.randrange(352)] = dice.randrange(256)
        if dice.random() < 0.2:
            del changed[dice.randrange(len(changed)) :]
        content = gzip.compress(changed, compresslevel=1) if compressed else bytes(changed)
        if compressed and dice.random() < 0.3:
            position = dice.randrange(len(content))
            content = content[:position] + b"\x55" + content[position + 1 :]
        try:
            for one in decode_file(content, OPTIONS):
                assert one.image.dtype == np.uint8
        except RejectedImage:
            rejected += 1
    assert rejected


@pytest.mark.parametrize("version", [1, 2])
def test_voxels_do_not_begin_within_the_header(version: int) -> None:
    content = make_nifti(ball(), version=version)
    place, kind = (108, np.float32) if version == 1 else (168, np.int64)
    assert rejection_of(with_header(content, place, kind(0))).detail == "voxels outside the file"
