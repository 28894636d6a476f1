"""METHOD A's mask removes the background, keeps the head, and is one piece."""

import cv2
import numpy as np
import pytest

from brainray.mri.phantom import make_slice
from brainray.mri.skull_strip import KERNEL_RADIUS, apply_mask, otsu_mask


def disc(radius: int, value: int, centre: tuple[int, int] = (100, 100)) -> np.ndarray:
    image = np.zeros((200, 200), np.uint8)
    cv2.circle(image, centre, radius, value, -1)
    return image


def test_the_mask_of_a_bright_disc_is_the_disc() -> None:
    image = disc(60, 180)
    mask = otsu_mask(image)
    overlap = (mask & (image > 0)).sum() / (mask | (image > 0)).sum()
    assert overlap > 0.93  # blur and relaxation widen the rim by a few pixels


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


@pytest.mark.parametrize("orientation", ["axial", "coronal", "sagittal"])
def test_a_phantoms_brain_is_kept_and_its_background_goes(orientation: str) -> None:
    phantom = make_slice("glioma", np.random.default_rng(5), orientation=orientation)
    mask = otsu_mask(phantom.image)
    assert (mask & phantom.brain_mask).sum() / phantom.brain_mask.sum() > 0.85
    assert not mask[0, 0]


def test_masking_keeps_inside_values_and_clears_the_rest() -> None:
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    np.testing.assert_array_equal(apply_mask(image, mask)[1:3, 1:3], image[1:3, 1:3])
    assert apply_mask(image, mask).sum() == image[1:3, 1:3].sum()
