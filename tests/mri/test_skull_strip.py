"""METHOD A's mask removes the background, keeps the head, and is one piece."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from brainray.mri.phantom import CLASSES, make_slice
from brainray.mri.skull_strip import (
    KERNEL_RADIUS,
    _dilate,
    _erode,
    apply_mask,
    otsu_mask,
    without_frame,
)
from brainray.mri.slices import ORIENTATIONS


def straightforward_otsu_mask(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """METHOD A, step 3, word for word: every operation on the whole slice."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (11, 11))
    blurred = cv2.GaussianBlur(image, (0, 0), 3.0)
    otsu, _ = cv2.threshold(blurred, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    binary = (blurred > otsu - 5).astype(np.uint8)
    closed = cv2.morphologyEx(binary, cv2.MORPH_CLOSE, kernel)
    opened = cv2.morphologyEx(closed, cv2.MORPH_OPEN, kernel)
    num_labels, labels, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=8)
    if num_labels == 1:
        return np.ones(image.shape, np.bool_)
    return np.asarray(labels == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA]))


def overlap(mask: np.ndarray, reference: np.ndarray) -> float:
    return float((mask & reference).sum() / (mask | reference).sum())


def disc(radius: int, value: int, centre: tuple[int, int] = (100, 100)) -> np.ndarray:
    image = np.zeros((200, 200), np.uint8)
    cv2.circle(image, centre, radius, value, -1)
    return image


def blobs(seed: int) -> np.ndarray:
    """Pieces of any size and shape, many of them cut by the frame, on a dark ground."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(40, 200, 2)
    noise = rng.standard_normal((height, width)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), float(rng.uniform(3.0, 12.0)))
    level = np.quantile(smooth, rng.uniform(0.4, 0.99))
    return np.where(smooth > level, rng.integers(90, 256), rng.integers(0, 40)).astype(np.uint8)


@pytest.mark.parametrize("size", [96, 224, 512])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_mask_equals_the_straightforward_one_on_phantoms(orientation: str, size: int) -> None:
    for seed, class_name in enumerate(CLASSES):
        image = make_slice(class_name, np.random.default_rng(seed), size, orientation).image
        assert overlap(otsu_mask(image), straightforward_otsu_mask(image)) >= 0.995


def test_the_mask_equals_the_straightforward_one_on_blobs() -> None:
    num_pieces, num_equal = [], 0
    for seed in range(150):
        image = blobs(seed)
        ours, oracle = otsu_mask(image), straightforward_otsu_mask(image)
        assert overlap(ours, oracle) >= 0.995
        num_equal += np.array_equal(ours, oracle)
        num_pieces.append(cv2.connectedComponents((image >= 90).astype(np.uint8))[0] - 1)
    assert num_equal >= 140  # bit for bit, but for ties in the blur's rounding
    assert min(num_pieces) == 1  # both ways through the code were taken
    assert max(num_pieces) > 5


def test_the_kernel_in_two_parts_dilates_and_erodes_as_the_ellipse_up_to_the_frame() -> None:
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (11, 11))
    rng = np.random.default_rng(0)
    for share in (0.02, 0.1, 0.5, 0.9, 0.98):
        for _ in range(100):
            binary = (rng.random(rng.integers(1, 30, 2)) < share).astype(np.uint8)
            np.testing.assert_array_equal(_dilate(binary), cv2.dilate(binary, ellipse))
            np.testing.assert_array_equal(_erode(binary), cv2.erode(binary, ellipse))


@pytest.mark.parametrize("value", [0, 3, 128, 255])
def test_where_nothing_stands_out_nothing_is_removed(value: int) -> None:
    assert otsu_mask(np.full((60, 80), value, np.uint8)).all()


def test_where_only_specks_stand_out_nothing_is_removed() -> None:
    image = np.zeros((60, 80), np.uint8)
    image[30, 40] = 255
    assert otsu_mask(image).all()
    np.testing.assert_array_equal(otsu_mask(image), straightforward_otsu_mask(image))


def test_the_mask_of_a_bright_disc_is_the_disc() -> None:
    image = disc(60, 180)
    mask = otsu_mask(image)
    assert overlap(mask, image > 0) > 0.93  # blur and relaxation widen the rim by a few pixels


def test_only_the_largest_piece_stays() -> None:
    image = np.maximum(disc(50, 180, (70, 100)), disc(12, 255, (170, 30)))
    mask = otsu_mask(image)
    assert mask[100, 70]
    assert not mask[30, 170]


def test_closing_fills_gaps_narrower_than_the_kernel() -> None:
    image = disc(60, 180)
    image[98:102, :] = 0
    assert otsu_mask(image)[100, 60:140].all()
    assert KERNEL_RADIUS == 5


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_phantoms_brain_is_kept_and_its_background_goes(orientation: str) -> None:
    phantom = make_slice("glioma", np.random.default_rng(5), orientation=orientation)
    mask = otsu_mask(phantom.image)
    assert (mask & phantom.brain_mask).sum() / phantom.brain_mask.sum() > 0.85
    assert not mask[0, 0]


def framed(image: np.ndarray, kind: str) -> np.ndarray:
    white = image.copy()
    if kind == "border":
        white = np.pad(image, 12, constant_values=255)
    elif kind == "bar":
        white = np.pad(image, ((0, 40), (0, 0)), constant_values=255)
    elif kind == "page":
        hull = cv2.convexHull(cv2.findNonZero((image > 40).astype(np.uint8)))
        white[cv2.fillConvexPoly(np.zeros_like(image), hull, 1) == 0] = 255
    encoded = cv2.imencode(".jpg", white, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE))


@pytest.mark.parametrize("kind", ["border", "bar", "page"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_white_frame_is_taken_off_and_the_head_stays(orientation: str, kind: str) -> None:
    phantom = make_slice("meningioma", np.random.default_rng(5), orientation=orientation)
    image = framed(phantom.image, kind)
    height, width = phantom.image.shape
    top, left = (12, 12) if kind == "border" else (0, 0)
    here = np.s_[top : top + height, left : left + width]
    brain = phantom.brain_mask
    assert (otsu_mask(image)[here] & brain).sum() < 0.5 * brain.sum()  # the head is lost with it
    cleaned = without_frame(image)
    assert (otsu_mask(cleaned)[here] & brain).sum() > 0.85 * brain.sum()
    np.testing.assert_array_equal(cleaned[here][brain], image[here][brain])


def test_the_grey_that_jpeg_leaves_beside_a_frame_goes_with_it() -> None:
    image = np.zeros((40, 40), np.uint8)
    image[:10] = 255
    image[10] = 180
    assert not without_frame(image).any()


def test_pieces_that_touch_a_frame_at_a_corner_go_with_it() -> None:
    image = np.zeros((40, 40), np.uint8)
    image[:10] = 255
    for step in range(5):
        image[10 + step, 20 + step] = 255
    assert not without_frame(image).any()


def test_an_image_without_a_frame_is_left_as_it_is() -> None:
    head = disc(60, 255)
    assert without_frame(head) is head
    captioned = head.copy()
    captioned[:10, :40] = 255  # less than a quarter of the edge
    assert without_frame(captioned) is captioned
    outlined = head.copy()
    outlined[1:-1, 1:-1] = 255  # a white line that touches no edge
    outlined[3:-3, 3:-3] = head[3:-3, 3:-3]
    assert without_frame(outlined) is outlined
    assert not without_frame(np.full((20, 20), 255, np.uint8)).any()


def test_masking_keeps_inside_values_and_clears_the_rest() -> None:
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    np.testing.assert_array_equal(apply_mask(image, mask)[1:3, 1:3], image[1:3, 1:3])
    assert apply_mask(image, mask).sum() == image[1:3, 1:3].sum()
