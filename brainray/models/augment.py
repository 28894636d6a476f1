"""METHOD A's augmentation, batched on the device of the slices."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from brainray.config import AugmentConfig


def augment(images: Tensor, config: AugmentConfig, generator: Generator) -> Tensor:
    """Flips, rotation, zoom, contrast and brightness, drawn for each slice.

    Args:
        images: (B, 1, H, W) float in [0, 1]; outside the slice is black.
        config: strengths and probabilities.
        generator: on the images' device.

    Returns:
        (B, 1, H, W) float in [0, 1].
    """
    theta = _random_affine(len(images), config, generator)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    contrast = 1 + config.max_intensity_shift * _signed(len(images), generator)
    brightness = config.max_intensity_shift * _signed(len(images), generator)
    # The background stays black, as it is in every slice that is not augmented.
    head = warped > 0
    shifted = warped * contrast[:, None, None, None] + brightness[:, None, None, None] * head
    return shifted.clamp(0, 1)


def _random_affine(num_images: int, config: AugmentConfig, generator: Generator) -> Tensor:
    """(B, 2, 3) matrices from output to input coordinates: rotation x zoom x flips."""
    # Heads are scanned nearly upright: cubed, half of the angles are below an eighth of the limit.
    angle = math.radians(config.max_rotation_deg) * _signed(num_images, generator) ** 3
    angle = angle * _chosen(num_images, config.rotation_probability, generator)
    zoom = 1 + config.max_zoom * _signed(num_images, generator)
    flip_x = 1 - 2 * _chosen(num_images, config.horizontal_flip, generator)
    flip_y = 1 - 2 * _chosen(num_images, config.vertical_flip, generator)
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    zero = torch.zeros_like(angle)
    return torch.stack(
        [
            torch.stack([cosine * flip_x, -sine * flip_y, zero], dim=1),
            torch.stack([sine * flip_x, cosine * flip_y, zero], dim=1),
        ],
        dim=1,
    )


def _signed(num_images: int, generator: Generator) -> Tensor:
    """(B,) uniform in [-1, 1)."""
    return 2 * torch.rand(num_images, generator=generator, device=generator.device) - 1


def _chosen(num_images: int, probability: float, generator: Generator) -> Tensor:
    """(B,) of 0 and 1, where 1 has the given probability."""
    draws = torch.rand(num_images, generator=generator, device=generator.device)
    return (draws < probability).float()
