"""Augmentation does what its settings say, and nothing when they are zero."""

import math

import torch
from torch import Generator

from brainray.config import AugmentConfig
from brainray.models.augment import _random_affine, augment

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
    assert torch.equal(apply(NOTHING), IMAGES)
    assert torch.equal(apply(AugmentConfig(policy="none")), IMAGES)
    barely = NOTHING.model_copy(update={"max_zoom": 1e-6})
    torch.testing.assert_close(apply(barely), IMAGES, atol=1e-4, rtol=0)


def test_each_slice_is_zoomed_by_its_own_factor() -> None:
    y, x = torch.meshgrid(torch.arange(65.0) - 32, torch.arange(65.0) - 32, indexing="ij")
    disc = (x**2 + y**2 < 20**2).float()
    config = NOTHING.model_copy(update={"max_zoom": 0.3})
    zoomed = apply(config, disc.expand(200, 1, -1, -1))
    factors = (zoomed.sum(dim=(1, 2, 3)) / disc.sum()).sqrt()
    assert 0.68 < factors.min() < 0.75
    assert 1.25 < factors.max() < 1.32
    assert 0.15 < factors.std() < 0.2  # uniform: 0.3 / sqrt(3)


def test_a_probability_is_the_share_of_slices() -> None:
    half = torch.zeros(400, 1, 8, 8)
    half[..., :4] = 1
    for probability in (0.2, 0.7):
        config = NOTHING.model_copy(update={"horizontal_flip": probability})
        flipped = apply(config, half)[..., 0].mean(dim=(1, 2)) < 0.5
        assert abs(flipped.float().mean() - probability) < 0.07


def test_brightness_and_contrast_vary_by_themselves() -> None:
    greys = torch.full((400, 1, 8, 8), 0.4)
    greys[..., :4] = 0.2
    changed = apply(NOTHING.model_copy(update={"max_intensity_shift": 0.1}), greys)
    dark, bright = changed[..., 0, 0, 0], changed[..., 0, 0, 7]
    contrast = (bright - dark) / 0.2
    brightness = dark - 0.2 * contrast
    for found, middle in ((contrast, 1.0), (brightness, 0.0)):
        assert middle - 0.1001 < found.min() < middle - 0.08
        assert middle + 0.08 < found.max() < middle + 0.1001
    assert abs(torch.corrcoef(torch.stack([contrast, brightness]))[0, 1]) < 0.15


def test_no_slice_is_no_slice() -> None:
    assert apply(AugmentConfig(policy="strong"), IMAGES[:0]).shape == (0, 1, 16, 16)


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


def test_a_turned_slice_keeps_its_shape_and_its_zoom() -> None:
    config = AugmentConfig(
        horizontal_flip=0.5, vertical_flip=0.5, max_rotation_deg=90.0, max_zoom=0.3
    )
    products = []
    for probability in (0.0, 1.0):
        turned = config.model_copy(update={"rotation_probability": probability})
        matrix = _random_affine(50, turned, Generator().manual_seed(0))[:, :, :2]
        products.append(matrix.mT @ matrix)  # of a rotation and a flip: the identity
    torch.testing.assert_close(*products)


def test_intensities_stay_in_range_and_differ_between_slices() -> None:
    config = NOTHING.model_copy(update={"max_intensity_shift": 0.5})
    changed = apply(config, torch.full((6, 1, 8, 8), 0.5))
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert len({round(float(image.mean()), 4) for image in changed}) == 6


def test_an_intensity_curve_is_a_function_of_the_intensity() -> None:
    """Of each slice another one, which leaves black black."""
    ramp = torch.linspace(0, 1, 256).repeat(20, 1, 4, 1)
    curved = apply(NOTHING.model_copy(update={"intensity_curve": 0.35}), ramp)
    assert torch.equal(curved[:, :, :1].expand_as(curved), curved)  # equal greys stay equal
    assert curved[..., 0].max() == 0
    assert (curved.diff(dim=-1).abs() < 0.05).all()  # smooth
    middle = curved[:, 0, 0, 100]
    assert middle.min() < 0.8 * ramp[0, 0, 0, 100]
    assert middle.max() > 1.2 * ramp[0, 0, 0, 100]


def test_an_intensity_curve_has_smaller_weights_for_higher_frequencies() -> None:
    ramp = torch.linspace(0.01, 0.5, 64)  # nothing gets as bright as white
    images = ramp.expand(2000, 1, 1, 64)
    curved = apply(NOTHING.model_copy(update={"intensity_curve": 0.1}), images)
    waves = torch.stack([torch.cos(torch.pi * k * ramp) for k in range(4)], dim=1).double()
    log_factors = (curved / images)[:, 0, 0].log().double()
    weights = torch.linalg.lstsq(waves, log_factors.T).solution  # (4, 2000)
    expected = 0.1 / torch.tensor([1, 1, 2, 3], dtype=torch.float64)
    torch.testing.assert_close(weights.std(dim=1), expected, rtol=0.05, atol=0)


def test_the_background_stays_black() -> None:
    images = IMAGES.clone()
    images[..., :4] = 0
    config = NOTHING.model_copy(update={"max_intensity_shift": 0.5})
    assert apply(config, images)[..., :3].abs().max() < 1e-5


def test_the_generator_alone_decides() -> None:
    config = AugmentConfig()
    torch.testing.assert_close(apply(config, seed=3), apply(config, seed=3))
    assert not torch.equal(apply(config, seed=3), apply(config, seed=4))


def test_what_has_no_strength_draws_no_numbers() -> None:
    plain = apply(AugmentConfig())
    none = AugmentConfig(max_cutout=0.5)  # with a probability of 0
    torch.testing.assert_close(apply(none), plain, rtol=0, atol=0)


def shifted_dots(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of dots in the middle of 41 x 41 pixels after shifts by up to a quarter."""
    image = torch.zeros(1, 1, 41, 41)
    image[..., 20, 20] = 1
    config = NOTHING.model_copy(update={"max_shift": 0.25})
    moved = apply(config, image.expand(count, -1, -1, -1))[:, 0]
    return moved.sum(dim=2).argmax(dim=1), moved.sum(dim=1).argmax(dim=1)


def test_shifts_move_by_their_share_of_the_side() -> None:
    for places in shifted_dots(60):
        assert 9 <= places.min() < 15
        assert 25 < places.max() <= 31


def test_slices_are_shifted_along_either_axis_by_themselves() -> None:
    rows, columns = shifted_dots(200)
    assert abs(torch.corrcoef(torch.stack([rows, columns]).double())[0, 1]) < 0.2


def test_gamma_darkens_some_slices_and_brightens_others() -> None:
    greys = torch.full((200, 1, 2, 2), 0.5)
    changed = apply(NOTHING.model_copy(update={"max_log_gamma": 1.0}), greys)
    assert 0.5 ** math.exp(1) <= changed.min() < 0.2
    assert 0.7 < changed.max() <= 0.5 ** math.exp(-1)


def test_each_slice_has_its_own_bias_field() -> None:
    greys = torch.full((2, 1, 16, 16), 0.5)
    one, other = apply(NOTHING.model_copy(update={"bias_field": 0.3}), greys)
    assert (one - other).abs().max() > 0.05


def test_each_slice_has_noise_of_its_own_strength_up_to_the_limit() -> None:
    greys = torch.full((200, 1, 32, 32), 0.5)
    noisy = apply(NOTHING.model_copy(update={"max_noise_std": 0.1}), greys)
    strengths = noisy.flatten(1).std(dim=1)
    assert strengths.min() < 0.01
    assert 0.09 < strengths.max() < 0.11


def test_gamma_and_bias_keep_black_black_and_order_in_place() -> None:
    ramp = torch.linspace(0, 1, 16).expand(8, 1, 16, 16)
    gamma = apply(NOTHING.model_copy(update={"max_log_gamma": 1.0}), ramp)
    assert (gamma.diff(dim=3) >= -1e-6).all()
    assert gamma[..., 8].std() > 0.05
    biased = apply(NOTHING.model_copy(update={"bias_field": 0.3}), ramp * 0.5)
    assert biased[..., 0].abs().max() < 1e-6
    ratio = biased[..., 8:] / (ramp[..., 8:] * 0.5)
    assert ratio.std() > 0.05  # uneven
    assert (ratio.log().diff(dim=2).abs() < 0.5).all()  # and smooth


def test_noise_and_blur_stay_within_the_head() -> None:
    images = torch.zeros(6, 1, 32, 32)
    images[..., 8:24, 8:24] = 0.5
    for update in ({"max_noise_std": 0.2}, {"max_blur_sigma": 2.0}):
        changed = apply(NOTHING.model_copy(update=update), images)
        assert changed[..., :7, :].abs().max() < 1e-6
        assert not torch.equal(changed, images)
    blurred = apply(NOTHING.model_copy(update={"max_blur_sigma": 2.0}), images)
    torch.testing.assert_close(blurred[..., 16, 16], images[..., 16, 16], atol=1e-3, rtol=0)
    edges = blurred[:, 0, 8, 16]
    assert (edges < 0.5).any()
    assert len(set(edges.tolist())) == len(edges)  # each slice by its own sigma


def test_cutout_blacks_out_one_square_of_up_to_the_limit() -> None:
    config = NOTHING.model_copy(update={"cutout_probability": 1.0, "max_cutout": 0.5})
    cut = apply(config, torch.ones(200, 1, 64, 64))[:, 0] < 0.5
    assert cut.any(dim=(1, 2)).float().mean() > 0.8
    heights, widths = cut.any(dim=2).sum(dim=1), cut.any(dim=1).sum(dim=1)
    assert torch.equal(cut.sum(dim=(1, 2)), heights * widths)
    for sides in (heights, widths):
        assert 28 < sides.max() <= 33


def test_a_share_of_the_slices_is_cut_each_at_its_own_place() -> None:
    config = NOTHING.model_copy(update={"cutout_probability": 0.4, "max_cutout": 0.5})
    cut = apply(config, torch.ones(300, 1, 32, 32))[:, 0] < 0.5
    is_cut = cut.any(dim=(1, 2))
    assert 0.3 < is_cut.float().mean() < 0.45
    for axis in (1, 2):
        tops = cut[is_cut].any(dim=axis).int().argmax(dim=1)
        bottoms = 31 - cut[is_cut].any(dim=axis).flip(1).int().argmax(dim=1)
        assert ((tops + bottoms) / 2).std() > 6


def test_a_policy_sets_what_is_not_set() -> None:
    strong = AugmentConfig.model_validate({"policy": "strong", "max_zoom": 0.05})
    assert strong.max_zoom == 0.05
    assert strong.bias_field > 0
    assert strong.cutout_probability > 0
    saved = AugmentConfig.model_validate(strong.model_dump())
    assert saved == strong
    assert AugmentConfig() == AugmentConfig.model_validate({"policy": "published"})
    changed = apply(strong)
    assert changed.shape == IMAGES.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
