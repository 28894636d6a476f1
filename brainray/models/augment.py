"""Batched augmentation of slices on their device: METHOD A's kinds and MRI scanner effects."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from brainray.config import AugmentConfig

_BIAS_KNOTS = 4  # knots of the bias field along each axis
_CURVE_TERMS = 4  # cosines over the range of intensities
_BLUR_RADIUS = 4  # pixels, at least


def augment(images: Tensor, config: AugmentConfig, generator: Generator) -> Tensor:
    """Flip, rotate, zoom, shift, shade, blur etc. each slice independently.

    Kinds other than METHOD A's draw no random numbers at zero strength, so that adding one does not
    change the others. The policy ``none`` returns the slices unchanged.

    Args:
        images: (B, 1, H, W) float in [0, 1] on a black background.
        config: strengths and probabilities.
        generator: on the images' device.

    Returns:
        (B, 1, H, W) float in [0, 1].
    """
    if config.changes_nothing or len(images) == 0:
        return images
    theta = _random_affine(len(images), config, generator)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    if config.intensity_curve:
        warped.mul_(_intensity_factor(warped, config.intensity_curve, generator)).clamp_(0, 1)
    contrast = 1 + config.max_intensity_shift * _signed(len(images), generator)
    brightness = config.max_intensity_shift * _signed(len(images), generator)
    # The background stays black, as in slices that are not augmented. In place from here on, since
    # a batch has hundreds of megabytes and every pass over it takes time.
    head = warped > 0
    shaded = warped.mul_(contrast[:, None, None, None])
    shaded.add_(brightness[:, None, None, None] * head)
    if config.max_log_gamma:
        gamma = torch.exp(config.max_log_gamma * _signed(len(images), generator))
        shaded.clamp_(0, 1).pow_(gamma[:, None, None, None])
    if config.bias_field:
        shaded.mul_(_bias_field(images, config.bias_field, generator))
    if config.max_blur_sigma:
        sigma = config.max_blur_sigma * _unsigned(len(images), generator)
        radius = max(_BLUR_RADIUS, math.ceil(3 * config.max_blur_sigma))
        shaded = _blur(shaded, sigma, radius).mul_(head)
    if config.max_noise_std:
        std = config.max_noise_std * _unsigned(len(images), generator)
        noise = torch.randn(images.shape, generator=generator, device=generator.device)
        shaded.add_(noise.mul_(std[:, None, None, None]).mul_(head))
    if config.cutout_probability:
        shaded.mul_(_outside_of_squares(images, config, generator))
    return shaded.clamp_(0, 1)


def _random_affine(num_images: int, config: AugmentConfig, generator: Generator) -> Tensor:
    """(B, 2, 3) matrices from output to input coordinates: rotation x zoom x flips, and shifts."""
    # Heads are scanned nearly upright, so angles are cubed: half are below 1/8 of the limit.
    angle = math.radians(config.max_rotation_deg) * _signed(num_images, generator) ** 3
    angle = angle * _chosen(num_images, config.rotation_probability, generator)
    zoom = 1 + config.max_zoom * _signed(num_images, generator)
    flip_x = 1 - 2 * _chosen(num_images, config.horizontal_flip, generator)
    flip_y = 1 - 2 * _chosen(num_images, config.vertical_flip, generator)
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    shift_x = shift_y = torch.zeros_like(angle)
    if config.max_shift:  # in coordinates from -1 to 1
        shift_x = 2 * config.max_shift * _signed(num_images, generator)
        shift_y = 2 * config.max_shift * _signed(num_images, generator)
    return torch.stack(
        [
            torch.stack([cosine * flip_x, -sine * flip_y, shift_x], dim=1),
            torch.stack([sine * flip_x, cosine * flip_y, shift_y], dim=1),
        ],
        dim=1,
    )


def _intensity_factor(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """(B, 1, H, W) positive factors, a random smooth function of intensity for each slice.

    Its logarithm is a sum of cosines with normal weights that decrease with the frequency.
    """
    shape = (_CURVE_TERMS, len(images), 1, 1, 1)
    weights = strength * torch.randn(shape, generator=generator, device=generator.device)
    log_factor = weights[0].expand_as(images).clone()
    for frequency in range(1, _CURVE_TERMS):
        wave = torch.cos(math.pi * frequency * images)
        log_factor += weights[frequency] / frequency * wave
    return log_factor.exp_()


def _bias_field(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """(B, 1, H, W) smooth positive factors around 1."""
    shape = (len(images), 1, _BIAS_KNOTS, _BIAS_KNOTS)
    knots = torch.randn(shape, generator=generator, device=generator.device)
    size = list(images.shape[-2:])
    return torch.exp(
        strength * F.interpolate(knots, size=size, mode="bicubic", align_corners=False)
    )


def _blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each slice (1, H, W) of a batch with its own sigma (B,), in pixels."""
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernels = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]).square())
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    as_channels = images.transpose(0, 1)  # one convolution group per slice
    for shape, padding in (
        ((-1, 1, 1, offsets.numel()), (0, radius)),
        ((-1, 1, offsets.numel(), 1), (radius, 0)),
    ):
        as_channels = F.conv2d(
            as_channels, kernels.view(shape), padding=padding, groups=len(images)
        )
    return as_channels.transpose(0, 1)


def _outside_of_squares(images: Tensor, config: AugmentConfig, generator: Generator) -> Tensor:
    """(B, 1, H, W): 0 inside a random square of each chosen slice, else 1."""
    num_images, height, width = len(images), images.shape[-2], images.shape[-1]
    half = config.max_cutout * _unsigned(num_images, generator) / 2
    half = half * _chosen(num_images, config.cutout_probability, generator)
    inside = torch.ones(num_images, height, width, dtype=torch.bool, device=images.device)
    for size, shape in ((height, (1, -1, 1)), (width, (1, 1, -1))):
        centre = _unsigned(num_images, generator)[:, None, None]
        position = ((torch.arange(size, device=images.device) + 0.5) / size).view(shape)
        inside &= (position - centre).abs() < half[:, None, None]
    return (~inside)[:, None].float()


def _unsigned(num_images: int, generator: Generator) -> Tensor:
    """(B,) uniform in [0, 1)."""
    return torch.rand(num_images, generator=generator, device=generator.device)


def _signed(num_images: int, generator: Generator) -> Tensor:
    """(B,) uniform in [-1, 1)."""
    return 2 * torch.rand(num_images, generator=generator, device=generator.device) - 1


def _chosen(num_images: int, probability: float, generator: Generator) -> Tensor:
    """(B,) of 0 and 1, with the given probability of 1."""
    draws = torch.rand(num_images, generator=generator, device=generator.device)
    return (draws < probability).float()
