"""Decide whether two fingerprints show the same slice: align each pair, then compare the residual.

Fingerprints of copies differ by a shift and a scale per axis (crops, borders, caption strips), by
a gain and a bias that clip at black and white (brightness, contrast), and by interpolation and
JPEG noise. `align` fits the first two by Gauss-Newton steps from coarse to fine, `compare` scores
the rest. All functions take batches of pairs, and the result for a pair does not depend on the
other pairs of its batch.

Warps are separable: each axis is resampled by a (T, S) matrix, so that warping a batch takes two
batched matrix products. Of the S pixels of an axis only the T inside the margins are computed.
Coordinates run from -1 to 1 across the frame.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = ((24, 6, None), (48, 3, 0.97), (96, 3, 0.0))
"""(side in pixels, Gauss-Newton steps, similarity below which a pair is dropped), coarse to fine.
Most neighbouring slices fail at the second level, which avoids the expensive third; the first is
too coarse for a decision."""

MARGIN = 0.125
"""Outer part of each frame that is ignored, as a fraction of its half side: 6 % of the side, where
a border, a caption strip or the edge of a crop may be."""

_PIXELS_AT_ONCE = 64 * 48**2  # per image, of the pairs aligned at a time: the CPU cache holds them

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
_UNMOVED = torch.tensor([[0.0, 1.0, 0.0, 1.0]])  # (1, 4), a frame


class Alignment(NamedTuple):
    """Mapping of the moving images to the fixed ones; all of length P."""

    frame: Tensor
    """(P, 4) float32: shift and scale of y, shift and scale of x; y_moving = scale * y + shift."""
    gain: Tensor
    """(P,) float32: fixed = gain * moving + bias, before clipping to 0..255."""
    bias: Tensor
    """(P,) float32, grey values."""


def similarity(fixed: Tensor, moving: Tensor) -> Tensor:
    """(P,) similarity of pairs (P, 96, 96) of grey values after alignment; at most 1.

    Pairs that differ at a coarser level are dropped and get 0.
    """
    brighter = _brightening(fixed, moving)
    fixed, moving = fixed * brighter, moving * brighter
    pyramid = [(shrink(fixed, side), shrink(moving, side)) for side, *_ in LEVELS]
    alignment = match_intensities(*pyramid[0])
    result = torch.zeros(len(fixed))
    alive = torch.arange(len(fixed))
    for (side, num_steps, least), (one, other) in zip(LEVELS, pyramid, strict=True):
        kept, aligned = [], []
        for block in torch.arange(len(alive)).split(_PIXELS_AT_ONCE // side**2):
            pairs = alive[block]
            start = Alignment(*(part[block] for part in alignment))
            refined = align(one[pairs], other[pairs], start, num_steps=num_steps)
            if least is not None:
                found = compare(one[pairs], other[pairs], refined)
                alike = found >= least
                result[pairs] = torch.where(alike, found, 0.0)
                pairs, refined = pairs[alike], Alignment(*(part[alike] for part in refined))
            kept.append(pairs)
            aligned.append(refined)
        alive = torch.cat(kept)
        alignment = Alignment(*(torch.cat(parts) for parts in zip(*aligned, strict=True)))
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
        warped = _warp(moving, frame)
        predicted = gain[:, None, None] * warped + bias[:, None, None]
        low, high = _common_range(gain, bias)
        # Where either slice is clipped, its intensity is a bound, not a value.
        residual = fixed.clamp(low, high) - predicted.clamp(low, high)
        inner = _inner(frame, side)
        spread = 1.0 + 2.0 * _mean(residual.abs(), inner)[:, None, None]
        weight = inner * _unclipped((fixed + predicted) / 2, gain, bias)
        weight = weight / (1.0 + (residual / spread).square())
        weight = weight.masked_fill((predicted < low - 0.5) | (predicted > high + 0.5), 0.0)
        slope_y, slope_x = _slopes(predicted, frame, side)
        columns = torch.stack(
            [
                slope_y,
                slope_y * y,
                slope_x,
                slope_x * x,
                warped / 128.0,
                torch.ones_like(warped),
                residual,
            ],
            dim=1,
        ).flatten(2)  # (P, 7, T * T)
        products = (columns[:, :6] * weight.flatten(1)[:, None]) @ columns.mT
        normal, gradient = products[:, :, :6], products[:, :, 6]
        normal = normal + torch.diag_embed(
            normal.diagonal(dim1=1, dim2=2) * _DAMPING + _DAMPING, dim1=1, dim2=2
        )
        step = torch.linalg.solve(normal, gradient)
        frame = _bounded(frame + step[:, :4].clamp(-0.1, 0.1))
        gain = (gain + step[:, 4] / 128.0).clamp(_MIN_GAIN, _MAX_GAIN)
        bias = bias + step[:, 5]
    return Alignment(frame=frame, gain=gain, bias=bias)


def match_intensities(fixed: Tensor, moving: Tensor) -> Alignment:
    """No movement, with the gain and bias that equalise mean and standard deviation inside."""
    inside = _inside(fixed.shape[-1])
    pair = torch.stack([fixed[:, inside, inside], moving[:, inside, inside]]).flatten(2)
    mean = pair.mean(dim=2)
    deviation = (pair - mean[:, :, None]).square().mean(dim=2).sqrt()
    gain = (deviation[0] / deviation[1].clamp_min(1e-3)).clamp(0.5, 2.0)
    return Alignment(frame=_UNMOVED.expand(len(fixed), 4), gain=gain, bias=mean[0] - gain * mean[1])


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
    inner = _inner(alignment.frame, side)
    lost = _lost_range(fixed, warped, inner, alignment)
    pair, weight = _comparable(fixed, warped, inner, alignment)
    fixed, warped = _band_pass(pair, weight)
    window = _gaussian(side, _LOCAL_SIGMA * side)
    stride = side // _LOCAL_PER_SIDE
    window = (window / window.sum(dim=1).max())[stride // 2 :: stride, _inside(side)]

    sums = torch.stack([torch.ones_like(fixed), fixed * warped, fixed.square(), warped.square()])
    covered, product, energy, other_energy = (window @ (sums * weight) @ window.T).flatten(2)
    noise = _NOISE_VARIANCE * covered
    scale = ((energy + noise) * (other_energy + noise)).sqrt()
    agreement = (product + noise) / scale.clamp_min(1e-6)
    usable = (covered > _LEAST_COVERED) & (torch.maximum(energy, other_energy) > noise)
    num_usable = usable.sum(dim=1)
    num_ranked = 1 + int(_WEAKEST_SHARE * usable.shape[1])
    ranked = torch.where(usable, agreement, torch.inf).topk(num_ranked, largest=False).values
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
    if pictures.shape[-1] == side:
        return pictures
    return pictures.unflatten(1, (side, -1)).mean(dim=2).unflatten(2, (side, -1)).mean(dim=3)


def _lost_range(fixed: Tensor, warped: Tensor, inner: Tensor, alignment: Alignment) -> Tensor:
    """(P,) grey values by which the ranges of aligned slices differ at black or white.

    At white they only count as far as pixels are that bright: a slice of another brightness in
    which nothing is clipped has lost nothing.
    """
    _, high = _common_range(alignment.gain, alignment.bias)
    is_white = (torch.maximum(fixed, warped) >= high - _NEAR_WHITE).float()
    clipped = _mean(is_white, inner) / _CLIPPED_SHARE
    at_black, at_white = _range_difference(alignment.gain, alignment.bias)
    return torch.maximum(at_black, at_white * clipped.clamp_max(1.0))


def _comparable(
    fixed: Tensor, warped: Tensor, inner: Tensor, alignment: Alignment
) -> tuple[Tensor, Tensor]:
    """Aligned slices (2, P, T, T), clipped to their common range, and the weights of pixels."""
    low, high = _common_range(alignment.gain, alignment.bias)
    weight = inner * _unclipped((fixed + warped) / 2, alignment.gain, alignment.bias)
    return torch.stack([fixed, warped]).clamp(low, high), weight


def _unclipped(values: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Weights 0..1 that exclude grey values near an end at which one of the slices is clipped.

    Slices are averaged after clipping, so their values near a clipped end are not exact.
    """
    low, high = _common_range(gain, bias)
    at_black, at_white = (lost[:, None, None] for lost in _range_difference(gain, bias))
    above = _ramp(values, low, at_black, sharp_below=4.0)
    return above * _ramp(values, high, -at_white, sharp_below=12.0)


def _ramp(values: Tensor, end: Tensor, width: Tensor, *, sharp_below: float) -> Tensor:
    """0 to 1 over at most ``_TAPER`` from ``end``, downwards if the width is negative; 1 everywhere
    if the width is too small to indicate clipping.
    """
    is_unclipped = width.abs() < sharp_below
    slope = torch.where(is_unclipped, 0.0, 1.0 / width.clamp(-_TAPER, _TAPER))
    return (slope * values + torch.where(is_unclipped, 1.0, -slope * end)).clamp(0.0, 1.0)


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
    """(2, P, T, T) blurred images (2, P, T, T) with weights (P, T, T)."""
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


def _inside(side: int) -> slice:
    """The T pixels of an axis of ``side`` pixels that are inside the margins."""
    margin = math.ceil(MARGIN * side / 2 - 0.5)
    return slice(margin, side - margin)


def _grid(side: int) -> Tensor:
    """(T,) centres of the pixels inside, in frame coordinates."""
    return ((torch.arange(side, dtype=torch.float32) + 0.5) / side * 2.0 - 1.0)[_inside(side)]


def _inner(frame: Tensor, side: int) -> Tensor:
    """(P, T, T) 1 where a pixel is inside the margins of the moving image, too."""
    grid = _grid(side)
    inner_y = (frame[:, 1:2] * grid + frame[:, 0:1]).abs() <= 1.0 - MARGIN
    inner_x = (frame[:, 3:4] * grid + frame[:, 2:3]).abs() <= 1.0 - MARGIN
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
    return _warp(pictures, _UNMOVED)


def _warp(pictures: Tensor, frame: Tensor) -> Tensor:
    """(P, T, T) images (P, S, S), resampled where ``frame`` maps the pixels inside."""
    weights_y, weights_x = _resampling(frame, pictures.shape[-1]).unbind(dim=1)
    return weights_y @ pictures @ weights_x.mT


def _slopes(values: Tensor, frame: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(P, T, T) derivatives of warped images with respect to the sampled y and x."""
    slope_y, slope_x = torch.gradient(values, spacing=2.0 / side, dim=(1, 2))
    return slope_y / frame[:, 1, None, None], slope_x / frame[:, 3, None, None]


def _resampling(frame: Tensor, side: int) -> Tensor:
    """(P, 2, T, S) weights of the source pixels for each pixel inside, for y and x.

    A quadratic B-spline: smooth and three pixels wide, which damps the aliasing of thumbnails.
    """
    shift, scale = frame[:, 0::2, None], frame[:, 1::2, None]
    position = scale * _grid(side) + shift
    source = (((position + 1.0) * side - 1.0) / 2.0).clamp(0.0, side - 1.0)
    taps = source.round()[..., None] + torch.tensor([-1.0, 0.0, 1.0])  # (P, 2, T, 3)
    away = (source[..., None] - taps).abs()
    outer = 0.5 * (1.5 - away).clamp_min(0.0).square()
    weights = torch.where(away < 0.5, 0.75 - away.square(), outer)
    weights = weights * ((taps >= 0) & (taps < side))
    weights = weights / weights.sum(dim=-1, keepdim=True)
    planes = torch.zeros(*source.shape, side)
    return planes.scatter_add_(-1, taps.clamp(0, side - 1).long(), weights)
