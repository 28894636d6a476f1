"""A rank's rows, relative to an origin near their mean."""

from typing import NamedTuple

import torch
from torch import Tensor

from brainray import dist
from brainray.clustering import lloyd_cpu, shards
from brainray.clustering.threads import shares, threads
from brainray.errors import ClusteringError

_FAR_MEAN = 0.7
"""Rows are far from the origin if the norm of their mean exceeds this share of their mean norm."""

_OVERFLOW_MARGIN = 16
"""Squared distances are sums of squared norms and of products that are at most as large."""


class CentredRows(NamedTuple):
    x: Tensor  # (n_rank, D), relative to an origin near the mean of all ranks' rows
    squares: Tensor  # (n_rank,) squared norms
    row_keys: Tensor  # (n_rank,) int64
    num_rows: int  # on all ranks
    energy: float  # sum of all ranks' squared norms
    spread: float  # sum of the squared distances of all ranks' rows to their mean


def centred(x: Tensor, row_keys: Tensor | None) -> tuple[CentredRows, Tensor]:
    """Centre the rows; returns them with their new origin (D,) (collective).

    The origin is their mean, or remains 0: rows that lie around 0 lose hardly any precision in
    their distances and are not copied. (The test uses norms, not squares, as a single outlier
    would otherwise hide how far away the others are.)

    Raises:
        ClusteringError: on all ranks: rows that `shards.check_rows` rejects, or too large to be
            squared; row keys that repeat or have the wrong shape or dtype.
    """
    shards.check_form(x)
    x = x.contiguous()
    norms, total = _measure(x)
    num_rows = shards.check_rows(x, total)
    row_keys = shards.resolve_row_keys(x, row_keys)
    norm_sum, energy = _sums_of_powers(norms)
    if not energy < torch.finfo(x.dtype).max / _OVERFLOW_MARGIN:  # the same on every rank
        raise ClusteringError(
            f"the squared norms of {num_rows} rows sum to {energy:.3g}, too large for safe "
            f"arithmetic in {x.dtype}: scale the rows down or convert them to float64"
        )
    mean = dist.sum_across_ranks(total) / num_rows
    mean_norm = float(torch.linalg.vector_norm(mean))
    origin = torch.zeros_like(mean, dtype=x.dtype)
    spread = max(energy - num_rows * mean_norm**2, 0.0)
    if num_rows * mean_norm > _FAR_MEAN * norm_sum:  # the same on every rank
        origin = mean.to(x.dtype)
        x, norms = _moved(x, origin)
        _, energy = _sums_of_powers(norms)
        spread = energy
    return CentredRows(x, norms.square(), row_keys, num_rows, energy, spread), origin


def _measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """Norms (n_rank,) of this rank's rows, and their sum (D,) float64."""
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x, dim=1), shards.sum_of_rows(x)
    norms = x.new_empty(len(x))
    parts = shares(len(x))
    totals = torch.zeros(len(parts), x.shape[1], dtype=torch.float64)
    arguments = [
        (x[rows].numpy(), norms[rows].numpy(), total.numpy())
        for rows, total in zip(parts, totals, strict=True)
    ]
    with threads() as ours:
        ours.call(lloyd_cpu.compiled(lloyd_cpu.measure_rows), arguments)
    return norms, totals.sum(dim=0)


def _moved(x: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """The rows relative to an origin (D,), and their new norms (n_rank,)."""
    if x.device.type != "cpu":
        x = x - origin
        return x, torch.linalg.vector_norm(x, dim=1)
    moved, norms = torch.empty_like(x), x.new_empty(len(x))
    arguments = [
        (x[rows].numpy(), origin.numpy(), moved[rows].numpy(), norms[rows].numpy())
        for rows in shares(len(x))
    ]
    with threads() as ours:
        ours.call(lloyd_cpu.compiled(lloyd_cpu.centre_rows), arguments)
    return moved, norms


def _sums_of_powers(norms: Tensor) -> tuple[float, float]:
    """Sums of all ranks' norms (n_rank,) and of their squares (collective)."""
    norms = norms.double()
    first, second = dist.sum_across_ranks(torch.stack([norms.sum(), norms.square().sum()])).tolist()
    return first, second
