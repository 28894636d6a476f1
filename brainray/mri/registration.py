"""Decide whether two fingerprints show the same slice: align each pair, then compare the residual.

Fingerprints of copies differ by a shift and a scale per axis (crops, borders, caption strips), by
a gain and a bias that clip at black and white (brightness, contrast), and by interpolation and
JPEG noise. `align` fits the first two by Gauss-Newton steps from coarse to fine, `compare` scores
the rest. All functions take batches of pairs, and the result for a pair does not depend on the
other pairs of its batch.

Warps are separable: each axis is resampled by an (S, S) matrix, so that warping a batch takes two
batched matrix products. Coordinates run from -1 to 1 across the frame.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = ((24, 8, None), (48, 4, 0.97), (96, 2, None))
"""(side in pixels, Gauss-Newton steps, similarity below which a pair is dropped), coarse to fine.
Most neighbouring slices fail at the second level, which avoids the expensive third; the first is
too coarse for a decision."""

MARGIN = 0.125
"""Outer part of each frame that is ignored, as a fraction of its half side: 6 % of the side, where
a border, a caption strip or the edge of a crop may be."""

_MAX_SHIFT = 0.12  # of the half side; a crop of 4 % and a border of 5 % need 0.09
_MIN_SCALE, _MAX_SCALE = 0.82, 1.22  # both slices of a pair cropped (or framed) on both sides
_MIN_GAIN, _MAX_GAIN = 0.4, 2.5
_DAMPING = 1e-3  # of the normal equations: a flat image has no gradient to solve for

_FINE_SIGMA = 1.2  # pixels: removes interpolation and JPEG differences
_COARSE_SIGMA = 1.5  # pixels: subtracted, so that edges and texture remain
_LEAST_WEIGHT = 1e-12  # of a Gaussian with maximum 1
_LOCAL_SIGMA = 1 / 16  # of the side: size of a neighbourhood
_LOCAL_PER_SIDE = 24  # neighbourhoods along either axis
_LEAST_COVERED = 0.2  # share of a usable neighbourhood
_NOISE_VARIANCE = 2.0  # grey values squared, after the band-pass: weaker structure is not evidence
_BRIGHT = 128.0  # grey value that all but `_NUM_BRIGHTER` pixels of dim pairs are raised to
_NUM_BRIGHTER = 46  # of 96 x 96 pixels, 0.5 %
_WEAKEST_SHARE = 0.05  # neighbourhoods that decide: a neighbouring slice differs in places
_MIN_NEIGHBOURHOODS = 12  # with structure; fewer are not sufficient evidence
_CLIPPING_RANGE = 30.0  # grey values of lost range at which the allowance is capped
_NEAR_WHITE = 24.0  # grey values below the brightest common one: blur darkens small spots
_CLIPPED_SHARE = 0.005  # of the pixels inside, at which white counts as clipped
_TAPER = 40.0  # grey values next to a clipped end that are blurred by area averaging


@dataclass(frozen=True)
class Alignment:
    """Mapping of the moving images to the fixed ones; all of length P."""

    frame: Tensor
    """(P, 4) float32: shift and scale of y, shift and scale of x; y_moving = scale * y + shift."""
    gain: Tensor
    """(P,) float32: fixed = gain * moving + bias, before clipping to 0..255."""
    bias: Tensor
    """(P,) float32, grey values."""

    @classmethod
    def identity(cls, num_pairs: int) -> "Alignment":
        """No movement and equal intensities."""
        frame = torch.tensor([[0.0, 1.0, 0.0, 1.0]]).repeat(num_pairs, 1)
        return cls(frame=frame, gain=torch.ones(num_pairs), bias=torch.zeros(num_pairs))

    def __getitem__(self, chosen: Tensor) -> "Alignment":
        return Alignment(self.frame[chosen], self.gain[chosen], self.bias[chosen])


def similarity(fixed: Tensor, moving: Tensor) -> Tensor:
    """(P,) similarity of pairs (P, 96, 96) of grey values after alignment; at most 1.

    Pairs that differ at a coarser level are dropped and get 0.
    """
    brighter = _brightening(fixed, moving)
    fixed, moving = fixed * brighter, moving * brighter
    result = torch.zeros(len(fixed))
    alive = torch.arange(len(fixed))
    alignment = match_intensities(fixed, moving)
    for side, num_steps, least in LEVELS:
        small_fixed, small_moving = shrink(fixed[alive], side), shrink(moving[alive], side)
        alignment = align(small_fixed, small_moving, alignment, num_steps=num_steps)
        if least is not None:
            keep = compare(small_fixed, small_moving, alignment) >= least
            alive, alignment = alive[keep], alignment[keep]
            if not len(alive):
                return result
    result[alive] = compare(fixed[alive], moving[alive], alignment)
    return result


def align(fixed: Tensor, moving: Tensor, start: Alignment, *, num_steps: int) -> Alignment:
    """Refine an alignment by robust Gauss-Newton steps on the grey values.

    Args:
        fixed: (P, S, S) float32 grey values, 0..255.
        moving: as ``fixed``.
        start: initial alignment; movements of more than about a pixel need a coarser level first.
        num_steps: number of steps; there is no convergence test.
    """
    side = fixed.shape[-1]
    fixed = _smooth(fixed)
    y, x = _grid(side)[:, None], _grid(side)
    frame, gain, bias = start.frame, start.gain, start.bias
    for _ in range(num_steps):
        warped, slope_y, slope_x = _warp_with_slopes(moving, frame)
        inner = _inner(frame, side)
        scale = gain[:, None, None]
        predicted = scale * warped + bias[:, None, None]
        low, high = _common_range(gain, bias)
        # Where either slice is clipped, its intensity is a bound, not a value.
        residual = fixed.clamp(low, high) - predicted.clamp(low, high)
        informative = inner * (predicted >= low - 0.5) * (predicted <= high + 0.5)
        informative = informative * _unclipped((fixed + predicted) / 2, gain, bias)
        spread = 1.0 + 2.0 * _mean(residual.abs(), inner)[:, None, None]
        weight = informative / (1.0 + (residual / spread).square())
        slopes = torch.stack(
            [
                scale * slope_y,
                scale * slope_y * y,
                scale * slope_x,
                scale * slope_x * x,
                warped / 128.0,
                torch.ones_like(warped),
            ],
            dim=1,
        ).flatten(2)  # (P, 6, S * S)
        weighted = slopes * weight.flatten(1)[:, None]
        normal = weighted @ slopes.mT
        normal = normal + torch.diag_embed(
            normal.diagonal(dim1=1, dim2=2) * _DAMPING + _DAMPING, dim1=1, dim2=2
        )
        step = torch.linalg.solve(normal, (weighted @ residual.flatten(1)[..., None])[..., 0])
        frame = _bounded(frame + step[:, :4].clamp(-0.1, 0.1))
        gain = (gain + step[:, 4] / 128.0).clamp(_MIN_GAIN, _MAX_GAIN)
        bias = bias + step[:, 5]
    return Alignment(frame=frame, gain=gain, bias=bias)


def match_intensities(fixed: Tensor, moving: Tensor) -> Alignment:
    """No movement, with the gain and bias that equalise mean and standard deviation inside."""
    unmoved = Alignment.identity(len(fixed))
    inner = _inner(unmoved.frame, fixed.shape[-1])
    mean_fixed, mean_moving = _mean(fixed, inner), _mean(moving, inner)
    deviation_fixed = _mean((fixed - mean_fixed[:, None, None]).square(), inner).sqrt()
    deviation_moving = _mean((moving - mean_moving[:, None, None]).square(), inner).sqrt()
    gain = (deviation_fixed / deviation_moving.clamp_min(1e-3)).clamp(0.5, 2.0)
    return Alignment(frame=unmoved.frame, gain=gain, bias=mean_fixed - gain * mean_moving)


def compare(fixed: Tensor, moving: Tensor, alignment: Alignment) -> Tensor:
    """Similarity (P,) of aligned pairs (P, S, S) by their local structure; at most 1.

    Both slices are band-passed and correlated in Gaussian neighbourhoods. The agreement is the 5 %
    quantile over the neighbourhoods with structure, as a neighbouring slice is similar nearly
    everywhere but not everywhere. Pairs with too little structure get an agreement of 0.

    The residual, 1 - agreement, of a copy grows by about exp(0.8) when it is resampled off the
    pixel grid and by up to exp(1.75) with lost intensities (from a logistic fit on real slices,
    copies versus neighbouring slices), which the similarity allows for. Neighbouring slices hardly
    move, so they get almost no allowance for movement.
    """
    side = fixed.shape[-1]
    gain, bias = alignment.gain[:, None, None], alignment.bias[:, None, None]
    fixed, warped = _smooth(fixed), gain * _warp(moving, alignment.frame) + bias
    lost = _lost_range(fixed, warped, alignment)
    fixed, warped, weight = _comparable(fixed, warped, alignment)
    fixed, warped = _band_pass(fixed, weight), _band_pass(warped, weight)
    window = _gaussian(side, _LOCAL_SIGMA * side)
    stride = side // _LOCAL_PER_SIDE
    window = (window / window.sum(dim=1).max())[stride // 2 :: stride]

    def local(values: Tensor) -> Tensor:
        return (window @ (values * weight) @ window.T).flatten(1)

    covered = local(torch.ones_like(fixed))
    noise = _NOISE_VARIANCE * covered
    energy, other_energy = local(fixed.square()), local(warped.square())
    agreement = (local(fixed * warped) + noise) / (
        (energy + noise) * (other_energy + noise)
    ).sqrt().clamp_min(1e-6)
    usable = (covered > _LEAST_COVERED) & (torch.maximum(energy, other_energy) > noise)
    num_usable = usable.sum(dim=1)
    ranked = torch.where(usable, agreement, torch.inf).sort(dim=1).values
    rank = (_WEAKEST_SHARE * num_usable).long()
    weakest = ranked.gather(1, rank[:, None])[:, 0]
    agreement = torch.where(num_usable >= _MIN_NEIGHBOURHOODS, weakest, 0.0)
    pixels_moved = _movement(alignment.frame) * side / 2
    allowance = 0.8 * pixels_moved.clamp_max(1.0)
    allowance = allowance + 1.75 * lost.clamp_max(_CLIPPING_RANGE) / _CLIPPING_RANGE
    return 1.0 - (1.0 - agreement) * torch.exp(-allowance)


def _brightening(fixed: Tensor, moving: Tensor) -> Tensor:
    """(P, 1, 1) common factor of the pairs, above 1 if both slices are dim: the structure of slices
    that were exported dark would otherwise count as noise.
    """
    bright = [slices.flatten(1).topk(_NUM_BRIGHTER).values[:, -1] for slices in (fixed, moving)]
    brightest = torch.maximum(*bright).clamp_min(1.0)
    return (_BRIGHT / brightest).clamp_min(1.0)[:, None, None]


def shrink(pictures: Tensor, side: int) -> Tensor:
    """(P, S, S) area-averaged to (P, side, side); ``side`` divides S."""
    return F.avg_pool2d(pictures[:, None], pictures.shape[-1] // side)[:, 0]


def _lost_range(fixed: Tensor, warped: Tensor, alignment: Alignment) -> Tensor:
    """(P,) grey values by which the ranges of aligned slices differ at black or white.

    At white they only count as far as pixels are that bright: a slice of another brightness in
    which nothing is clipped has lost nothing.
    """
    _, high = _common_range(alignment.gain, alignment.bias)
    is_white = (torch.maximum(fixed, warped) >= high - _NEAR_WHITE).float()
    clipped = _mean(is_white, _inner(alignment.frame, fixed.shape[-1])) / _CLIPPED_SHARE
    at_black, at_white = _range_difference(alignment.gain, alignment.bias)
    return torch.maximum(at_black, at_white * clipped.clamp_max(1.0))


def _comparable(
    fixed: Tensor, warped: Tensor, alignment: Alignment
) -> tuple[Tensor, Tensor, Tensor]:
    """Aligned slices, clipped to their common range, and the weights of their pixels."""
    low, high = _common_range(alignment.gain, alignment.bias)
    weight = _inner(alignment.frame, fixed.shape[-1])
    weight = weight * _unclipped((fixed + warped) / 2, alignment.gain, alignment.bias)
    return fixed.clamp(low, high), warped.clamp(low, high), weight


def _unclipped(values: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Weights 0..1 that exclude grey values near an end at which one of the slices is clipped.

    Slices are averaged after clipping, so their values near a clipped end are not exact.
    """
    low, high = _common_range(gain, bias)
    at_black, at_white = _range_difference(gain, bias)
    weight = _ramp(values - low, at_black[:, None, None].clamp_max(_TAPER), sharp_below=4.0)
    return weight * _ramp(
        high - values, at_white[:, None, None].clamp_max(_TAPER), sharp_below=12.0
    )


def _ramp(distance: Tensor, width: Tensor, *, sharp_below: float) -> Tensor:
    """0 to 1 over ``width``; 1 everywhere if the width is too small to indicate clipping."""
    ramp = (distance / width.clamp_min(1e-3)).clamp(0.0, 1.0)
    return torch.where(width < sharp_below, torch.ones_like(ramp), ramp)


def _range_difference(gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) grey values by which two slices' ranges differ at black and at white."""
    return bias.abs(), (255.0 * gain + bias - 255.0).abs()


def _common_range(gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(P, 1, 1) darkest and brightest fixed grey values that both slices can represent."""
    low = bias.clamp_min(0.0)
    high = torch.maximum((255.0 * gain + bias).clamp_max(255.0), low + 1.0)
    return low[:, None, None], high[:, None, None]


def _band_pass(values: Tensor, weight: Tensor) -> Tensor:
    """Fine minus coarse blur, both over weighted pixels only, so that borders do not bleed in."""
    fine = _weighted_blur(values, weight, _FINE_SIGMA)
    return fine - _weighted_blur(values, weight, _COARSE_SIGMA)


def _weighted_blur(values: Tensor, weight: Tensor, sigma: float) -> Tensor:
    kernel = _gaussian(values.shape[-1], sigma)
    return kernel @ (values * weight) @ kernel / (kernel @ weight @ kernel).clamp_min(1e-6)


def _gaussian(side: int, sigma: float) -> Tensor:
    """(S, S) symmetric: one row per centre, not normalised.

    Weights that are negligible in a float32 sum are set to 0: the smallest would be subnormal
    numbers, which slow down matrix products tenfold.
    """
    position = torch.arange(side, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((position[:, None] - position) / sigma).square())
    return torch.where(weights < _LEAST_WEIGHT, 0.0, weights)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """(P,) weighted mean over the image."""
    return (values * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp_min(1e-6)


def _grid(side: int) -> Tensor:
    """(S,) pixel centres in frame coordinates."""
    return (torch.arange(side, dtype=torch.float32) + 0.5) / side * 2.0 - 1.0


def _inner(frame: Tensor, side: int) -> Tensor:
    """(P, S, S) 1 where a pixel is inside the margins of both frames."""
    grid = _grid(side)
    unmoved = grid.abs() <= 1.0 - MARGIN
    inner_y = unmoved & ((frame[:, 1:2] * grid + frame[:, 0:1]).abs() <= 1.0 - MARGIN)
    inner_x = unmoved & ((frame[:, 3:4] * grid + frame[:, 2:3]).abs() <= 1.0 - MARGIN)
    return inner_y.float()[:, :, None] * inner_x.float()[:, None, :]


def _movement(frame: Tensor) -> Tensor:
    """(P,) largest displacement of an edge of the frame, in frame coordinates."""
    shift, stretch = frame[:, 0::2], frame[:, 1::2] - 1.0
    return (shift.abs() + stretch.abs()).max(dim=1).values


def _bounded(frame: Tensor) -> Tensor:
    shift, scale = frame[:, 0::2], frame[:, 1::2]
    shift = shift.clamp(-_MAX_SHIFT, _MAX_SHIFT)
    scale = scale.clamp(_MIN_SCALE, _MAX_SCALE)
    return torch.stack([shift[:, 0], scale[:, 0], shift[:, 1], scale[:, 1]], dim=1)


def _smooth(pictures: Tensor) -> Tensor:
    """Resample at the pixel centres: the same blur that warping applies to the other image."""
    unmoved = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    weights = _resampling(unmoved[:, :2], pictures.shape[-1])[0][0]
    return weights @ pictures @ weights.T


def _warp(pictures: Tensor, frame: Tensor) -> Tensor:
    side = pictures.shape[-1]
    weights_y, _ = _resampling(frame[:, :2], side)
    weights_x, _ = _resampling(frame[:, 2:], side)
    return weights_y @ pictures @ weights_x.mT


def _warp_with_slopes(pictures: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The warped images and their derivatives with respect to the sampled y and x."""
    side = pictures.shape[-1]
    weights_y, slopes_y = _resampling(frame[:, :2], side)
    weights_x, slopes_x = _resampling(frame[:, 2:], side)
    rows = weights_y @ pictures
    return rows @ weights_x.mT, slopes_y @ pictures @ weights_x.mT, rows @ slopes_x.mT


def _resampling(shift_and_scale: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(P, S, S) weights of the source pixels for each target pixel, and their derivatives.

    A quadratic B-spline: smooth and three pixels wide, which damps the aliasing of thumbnails.
    """
    position = shift_and_scale[:, 1:] * _grid(side) + shift_and_scale[:, :1]
    source = (((position + 1.0) * side - 1.0) / 2.0).clamp(0.0, side - 1.0)
    taps = source.round().long()[:, :, None] + torch.tensor([-1, 0, 1])  # (P, S, 3)
    distance = source[:, :, None] - taps
    away = distance.abs()
    inside = (taps >= 0) & (taps < side)
    outer = (1.5 - away).clamp_min(0.0)
    weights = torch.where(away < 0.5, 0.75 - away.square(), 0.5 * outer.square()) * inside
    weights = weights / weights.sum(dim=2, keepdim=True)
    slopes = torch.where(away < 0.5, -2.0 * distance, -outer * distance.sign()) * inside
    planes = torch.zeros(2, len(source), side, side)
    planes[0].scatter_add_(2, taps.clamp(0, side - 1), weights)
    planes[1].scatter_add_(2, taps.clamp(0, side - 1), slopes * (side / 2.0))
    return planes[0], planes[1]
