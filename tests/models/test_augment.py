"""Augmentation does what its settings say, and nothing when they are zero."""

import torch
from torch import Generator

from brainray.config import AugmentConfig
from brainray.models.augment import augment

NOTHING = AugmentConfig(
    horizontal_flip=0,
    vertical_flip=0,
    rotation_probability=0,
    max_zoom=0,
    max_intensity_shift=0,
)
IMAGES = torch.rand(6, 1, 16, 16, generator=Generator().manual_seed(0))


def apply(config: AugmentConfig, images: torch.Tensor = IMAGES, seed: int = 1) -> torch.Tensor:
    return augment(images, config, Generator().manual_seed(seed))


def test_zero_strength_changes_nothing() -> None:
    torch.testing.assert_close(apply(NOTHING), IMAGES, atol=1e-5, rtol=0)


def test_certain_flips_are_flips() -> None:
    sideways = NOTHING.model_copy(update={"horizontal_flip": 1.0})
    upside_down = NOTHING.model_copy(update={"vertical_flip": 1.0})
    torch.testing.assert_close(apply(sideways), IMAGES.flip(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(apply(upside_down), IMAGES.flip(-2), atol=1e-5, rtol=0)


def test_rotations_keep_the_centre_and_stay_within_the_angle() -> None:
    image = torch.zeros(1, 1, 65, 65)
    image[..., 32, 32:64] = 1  # a ray to the right
    config = NOTHING.model_copy(update={"rotation_probability": 1.0, "max_rotation_deg": 90.0})
    rotated = apply(config, image.expand(50, -1, -1, -1))
    assert (rotated[:, 0, 32, 32] > 0.2).all()
    assert rotated[:, 0, :, :28].max() < 0.05  # never more than a quarter turn
    assert rotated[:, 0, :20].sum() > 0
    assert rotated[:, 0, 45:].sum() > 0


def test_small_rotations_are_the_most_frequent() -> None:
    image = torch.zeros(1, 1, 65, 65)
    image[..., 32, 32:64] = 1
    config = NOTHING.model_copy(update={"rotation_probability": 1.0, "max_rotation_deg": 80.0})
    rotated = apply(config, image.expand(400, -1, -1, -1))[:, 0]
    y, x = torch.meshgrid(torch.arange(65.0) - 32, torch.arange(65.0) - 32, indexing="ij")
    angle = torch.atan2((rotated * y).sum(dim=(1, 2)), (rotated * x).sum(dim=(1, 2))).rad2deg()
    assert 0.4 < (angle.abs() < 10).float().mean() < 0.6
    assert (angle > 40).any()
    assert (angle < -40).any()


def test_intensities_stay_in_range_and_differ_between_slices() -> None:
    config = NOTHING.model_copy(update={"max_intensity_shift": 0.5})
    changed = apply(config, torch.full((6, 1, 8, 8), 0.5))
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert len({round(float(image.mean()), 4) for image in changed}) == 6


def test_the_background_stays_black() -> None:
    images = IMAGES.clone()
    images[..., :4] = 0
    config = NOTHING.model_copy(update={"max_intensity_shift": 0.5})
    assert apply(config, images)[..., :3].abs().max() < 1e-5


def test_the_generator_alone_decides() -> None:
    config = AugmentConfig()
    torch.testing.assert_close(apply(config, seed=3), apply(config, seed=3))
    assert not torch.equal(apply(config, seed=3), apply(config, seed=4))
