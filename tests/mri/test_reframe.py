"""What is left of a slice whatever another collection has put around it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from brainray.config import NearDuplicateConfig, PreprocessConfig
from brainray.mri.duplicates import COPY, Twins
from brainray.mri.leakage import Fingerprints, exposure
from brainray.mri.phantom import CLASSES, make_series, make_slice
from brainray.mri.reframe import _stretched, find_twins_by_head, reframed
from brainray.mri.resize import crop_foreground, thumbnail
from brainray.mri.skull_strip import otsu_mask

Image = NDArray[np.uint8]


def fingerprints(images: list[Image]) -> NDArray[np.uint8]:
    return np.stack([thumbnail(np.ascontiguousarray(image)).ravel() for image in images])


@pytest.fixture(scope="module")
def images() -> list[Image]:
    rng = np.random.default_rng(0)
    return [make_slice(CLASSES[number % len(CLASSES)], rng).image for number in range(16)]


def known(images: list[Image], names: str) -> Fingerprints:
    nobody = [None] * len(images)
    ids = [f"{names}-{number}" for number in range(len(images))]
    foreign = np.zeros(len(images), np.bool_)
    return Fingerprints(ids, fingerprints(images), nobody, nobody, foreign, nobody)


def from_elsewhere(slices: Fingerprints) -> Fingerprints:
    return replace(slices, elsewhere=~slices.elsewhere)


@pytest.mark.parametrize(
    ("change", "least_found"),
    [
        (lambda image: np.pad(image, 40), 13),
        (lambda image: np.pad(image, ((0, 0), (50, 50))), 12),
        (lambda image: np.pad(image, 30, constant_values=255), 7),
        (lambda image: crop_foreground(image, otsu_mask(image)), 9),
        (lambda image: image // 6, 15),
    ],
    ids=["padded", "padded left and right", "white border", "cut to the head", "dark"],
)
def test_a_copy_from_elsewhere_is_found_by_its_head(
    images: list[Image], change: Callable[[Image], Image], least_found: int
) -> None:
    queries, seen = known([change(image) for image in images], "queries"), known(images, "seen")
    config = PreprocessConfig()
    once = exposure(queries, seen, config)
    twice = exposure(from_elsewhere(queries), seen, config)
    its_own = twice.twin == np.arange(len(images))
    assert once.clean.mean() > 0.5
    assert its_own.sum() >= least_found
    assert not twice.clean[its_own].any()
    np.testing.assert_array_equal(twice.twin[~its_own], -1)
    foreign = exposure(queries, from_elsewhere(seen), config)
    np.testing.assert_array_equal(foreign.twin, twice.twin)


def test_a_dark_copy_from_elsewhere_counts_more_than_a_mirrored_one(images: list[Image]) -> None:
    """Which has the same frame and brightness, but is no reason to call a slice unclean."""
    query, stranger = images[0], images[1]
    seen = known([stranger, query[:, ::-1], query // 6], "seen")
    found = exposure(from_elsewhere(known([query], "queries")), seen, PreprocessConfig())
    assert (found.twin.tolist(), found.kind.tolist()) == ([2], ["copy"])
    assert not found.clean.any()


def test_a_copy_among_those_that_are_from_elsewhere_is_named_by_its_row(
    images: list[Image],
) -> None:
    seen = replace(
        known([images[1], images[2], images[0] // 6], "seen"),
        elsewhere=np.array([False, True, True]),
    )
    found = exposure(known(images[:1], "queries"), seen, PreprocessConfig())
    assert found.twin.tolist() == [2]


def test_a_stricter_setting_applies_to_heads_too(images: list[Image]) -> None:
    padded = fingerprints([np.pad(image, 40) for image in images[:4]])
    references = fingerprints(images[:4])
    assert (find_twins_by_head(padded, references, NearDuplicateConfig()).reference >= 0).any()
    strict = NearDuplicateConfig(similarity=1.0, turned_similarity=1.0)
    assert (find_twins_by_head(padded, references, strict).reference == -1).all()


def test_neighbouring_slices_and_other_heads_are_no_copies(images: list[Image]) -> None:
    series = [phantom.image for phantom in make_series("glioma", np.random.default_rng(1), 6)]
    references = fingerprints(series[::2])
    for others in (series[1::2], images):
        found = find_twins_by_head(fingerprints(others), references, NearDuplicateConfig())
        np.testing.assert_array_equal(found.reference, -1)


def test_a_picture_without_a_head_stays_as_it_is() -> None:
    blank = np.zeros((2, 96 * 96), np.uint8)
    np.testing.assert_array_equal(reframed(blank)[np.arange(2)], blank)
    assert len(reframed(blank[:0])) == 0


def test_the_head_is_moved_to_the_middle() -> None:
    picture = np.zeros((96, 96), np.uint8)
    picture[15:63, 8:68] = 200
    found = reframed(picture.reshape(1, -1))[np.arange(1)].reshape(96, 96).astype(int)
    np.testing.assert_allclose(found, found[::-1, ::-1], atol=3)


def test_a_thin_line_beside_the_head_does_not_move_it() -> None:
    picture = np.zeros((96, 96), np.uint8)
    picture[15:63, 8:68] = 200
    with_line = picture.copy()
    with_line[40, 68:] = 200
    plain, lined = reframed(np.stack([picture.ravel(), with_line.ravel()]))[np.arange(2)]
    difference = np.abs(lined.astype(int) - plain).reshape(96, 96)
    assert difference[:, :80].max() <= 2


def test_a_hot_and_a_dead_pixel_do_not_change_the_others() -> None:
    picture = np.linspace(10, 100, 96 * 96, dtype=np.float32).reshape(96, 96)
    stretched = _stretched(picture).astype(int)
    picture[0, 0], picture[-1, -1] = 0, 255  # the darkest and the brightest one
    np.testing.assert_allclose(_stretched(picture), stretched, atol=1)


def test_a_second_look_replaces_none_and_turned_twins_alone() -> None:
    def twins(*found: tuple[int, int]) -> Twins:
        reference, kind = np.array(found).T
        return Twins(reference, kind.astype(np.int8), (reference >= 0).astype(np.float32))

    first = twins((4, COPY), (5, 1), (-1, COPY), (-1, COPY), (6, 2))
    merged = first.completed_by(
        np.arange(5), twins((3, COPY), (7, COPY), (8, 1), (-1, COPY), (9, 1))
    )
    assert merged.reference.tolist() == [4, 7, 8, -1, 6]
    assert merged.kind.tolist() == [COPY, COPY, 1, COPY, 2]
    assert merged.is_upright.tolist() == [True, True, False, False, False]
    assert first.reference.tolist() == [4, 5, -1, -1, 6]
