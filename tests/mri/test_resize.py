"""Geometry and intensity of stored slices, by hand-worked cases."""

import numpy as np

from brainray.mri.resize import crop_foreground, letterbox, min_max, stretch, thumbnail


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
