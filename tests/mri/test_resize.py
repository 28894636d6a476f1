"""Geometry and intensity of stored slices, by hand-worked cases."""

import numpy as np
import pytest

from brainray.mri.resize import (
    MID_GREY,
    auto_gamma,
    crop_foreground,
    letterbox,
    min_max,
    stretch,
    thumbnail,
)


def test_stretch_halves_by_averaging() -> None:
    image = np.array([[0, 2, 10, 10], [2, 4, 10, 10]], np.uint8)
    np.testing.assert_array_equal(stretch(image.repeat(2, 0), 2), [[1, 10], [3, 10]])


def test_a_side_that_grows_is_interpolated_though_the_other_shrinks() -> None:
    image = np.full((2, 8), [[0], [100]], np.uint8)
    expected = np.full((4, 4), [[0], [25], [75], [100]])
    np.testing.assert_array_equal(stretch(image, 4), expected)


def test_letterbox_keeps_the_aspect_ratio_and_centres() -> None:
    image = np.full((40, 80), 200, np.uint8)
    boxed = letterbox(image, 40)
    assert boxed.shape == (40, 40)
    assert (boxed[10:30] == 200).all()
    assert boxed[:10].sum() == boxed[30:].sum() == 0


def test_a_letterboxed_strip_keeps_at_least_a_pixel() -> None:
    strip = np.full((2, 1000), 200, np.uint8)
    for image, axis in ((strip, 1), (strip.T, 0)):
        boxed = letterbox(image, 100)
        assert (boxed == 200).all(axis=axis).sum() == 1
        assert np.count_nonzero(boxed) == 100


def test_cropping_leaves_the_foreground_and_nothing_around_it() -> None:
    image = np.arange(30, dtype=np.uint8).reshape(5, 6)
    foreground = np.zeros((5, 6), np.bool_)
    foreground[1, 4] = foreground[3, 2] = True
    np.testing.assert_array_equal(crop_foreground(image, foreground), image[1:4, 2:5])
    np.testing.assert_array_equal(crop_foreground(image, np.zeros_like(foreground)), image)


def test_min_max_spans_the_range() -> None:
    stretched = min_max(np.array([[10, 20], [30, 60]], np.uint8))
    assert stretched.min() == 0
    assert stretched.max() == 255
    np.testing.assert_array_equal(min_max(np.full((3, 3), 9, np.uint8)), np.zeros((3, 3)))


@pytest.mark.parametrize(("brightness", "gamma"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (0.8, 1.6)])
def test_auto_gamma_undoes_brightness_and_gamma(brightness: float, gamma: float) -> None:
    head = np.zeros((64, 64), np.uint8)
    head[8:56, 8:56] = np.random.default_rng(0).integers(20, 256, (48, 48))
    altered = (255 * brightness * (head / 255) ** gamma).astype(np.uint8)
    found = auto_gamma(altered)
    assert abs(float(np.median(found[found > 0])) - 255 * MID_GREY) <= 2
    assert found.max() == 255
    np.testing.assert_array_equal(found == 0, head == 0)
    np.testing.assert_allclose(found.astype(int), auto_gamma(head).astype(int), atol=5)


@pytest.mark.parametrize("grey", [0, 9, 255])
def test_auto_gamma_of_a_constant_slice_is_black(grey: int) -> None:
    np.testing.assert_array_equal(auto_gamma(np.full((3, 3), grey, np.uint8)), np.zeros((3, 3)))


@pytest.mark.parametrize(("tissue", "power"), [(1, 1 / 4), (254, 4)])
def test_auto_gamma_of_what_is_nearly_black_or_white_keeps_its_greys(
    tissue: int, power: float
) -> None:
    image = np.full((16, 16), tissue, np.uint8)
    image[0] = np.arange(16) * 17  # 0 to 255
    np.testing.assert_allclose(auto_gamma(image), 255 * (image / 255) ** power, atol=0.5)


def test_a_thumbnail_hardly_depends_on_resolution() -> None:
    y, x = np.mgrid[0:256, 0:256]
    large = (127 + 100 * np.sin(x / 30) * np.cos(y / 40)).astype(np.uint8)
    small = stretch(large, 128)
    difference = thumbnail(large).astype(int) - thumbnail(small).astype(int)
    assert np.abs(difference).max() <= 1


def test_a_thumbnail_averages_areas() -> None:
    image = np.random.default_rng(0).integers(0, 256, (384, 384)).astype(np.uint8)
    means = image.reshape(96, 4, 96, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(thumbnail(image), means, atol=0.51)
