"""Random draws of rows, and k-means++, with results that are independent of the sharding.

The stream of a generator depends on how many numbers each rank takes from it. Here every row gets
its own random number instead, a hash of (seed, step, row key), and a draw is an exponential race:
with u uniform, -log(u) / w is exponential with rate w, and the first arrival is row i with
probability w_i / sum(w) (the Gumbel-max trick without the outer logarithm). `draw_sample` is for
rows that one process holds.
"""

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainray import dist
from brainray.clustering import shards
from brainray.errors import ClusteringError


def seed_of(*parts: int) -> int:
    """A seed below 2^56 that is different for different tuples of parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def draw_sample(num_rows: int, max_rows: int, seed: int) -> NDArray[np.int64]:
    """Sorted indices of at most ``max_rows`` rows drawn at random; all rows if there are fewer."""
    if num_rows <= max_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, max_rows, replace=False))


def uniform_from_keys(seed: int, step: int, row_keys: Tensor) -> Tensor:
    """One deterministic number per key in the open interval (0, 1), float64."""
    device = row_keys.device
    stream = _splitmix64(torch.tensor(_as_int64(seed), device=device))
    stream = _splitmix64(stream ^ torch.tensor(step, device=device))
    bits = _shift_right(_splitmix64(_splitmix64(row_keys) ^ stream), 12)
    # 52 bits plus one half: never 0 or 1, and each value is exact in float64.
    return (bits.double() + 0.5) * 2.0**-52


def draw_rows(
    x: Tensor,  # (n_rank, D)
    weights: Tensor,  # (n_rank,) float64, not negative
    row_keys: Tensor,  # (n_rank,) int64
    *,
    seed: int,
    step: int,
    count: int = 1,
) -> Tensor:  # (count, D)
    """Draw rows of all ranks without replacement, proportional to their weights (collective)."""
    race = weights / -uniform_from_keys(seed, step, row_keys).log()
    return shards.top_rows(x, race, row_keys, count).rows


def kmeans_plus_plus(
    x: Tensor,  # (n_rank, D), relative to an origin that they lie around
    num_clusters: int,
    row_keys: Tensor,  # (n_rank,) int64
    *,
    seed: int,
    first_step: int = 0,
) -> Tensor:  # (K, D) float64
    """Greedy k-means++ (Arthur & Vassilvitskii 2007; greedy as in scikit-learn), collective.

    For each further centre, 2 + log K candidate rows are drawn with probability proportional to
    their squared distance to the nearest centre so far; the candidate that reduces the sum of these
    distances most is kept. Departure: candidates are drawn without replacement.

    Raises:
        ClusteringError: there are fewer distinct rows than clusters.
    """
    num_candidates = 2 + int(math.log(num_clusters))
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)  # without a copy of the rows
    total = dist.sum_across_ranks(norm.square())
    first_weights = torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
    center = draw_rows(x, first_weights, row_keys, seed=seed, step=first_step)[0].double()
    centers = [center]
    nearest = _squared_distances_to(x, center)
    for step in range(1, num_clusters):
        potential = dist.sum_across_ranks(nearest.sum())
        if potential <= shards.IDENTICAL_ROWS_RATIO * total:
            raise too_few_distinct_rows(num_distinct=step, num_clusters=num_clusters)
        candidates = draw_rows(
            x, nearest, row_keys, seed=seed, step=first_step + step, count=num_candidates
        ).double()
        potentials = _potentials(x, candidates, nearest)
        # In float32, potentials that differ only by rounding are ties, won by the first.
        center = candidates[int(potentials.float().argmin())]
        centers.append(center)
        nearest = torch.minimum(nearest, _squared_distances_to(x, center))
    return torch.stack(centers)


def too_few_distinct_rows(num_distinct: int, num_clusters: int) -> ClusteringError:
    return ClusteringError(
        f"{num_clusters} clusters need as many distinct rows, but there are only {num_distinct}: "
        "lower clustering.num_clusters, or check why the embeddings coincide (a collapsed or "
        "constant encoder, duplicated images)"
    )


def _squared_distances_to(x: Tensor, center: Tensor) -> Tensor:
    """(n_rank,) float64; from differences, so that a copy of the centre has distance exactly 0."""
    distances = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    for block in shards.cached_blocks(x, x.shape[1]):
        distances[block] = (x[block].double() - center).square().sum(dim=1)
    return distances


def _potentials(x: Tensor, candidates: Tensor, nearest: Tensor) -> Tensor:
    """Remaining sum of squared distances (L,) for each candidate (collective)."""
    potentials = torch.zeros(candidates.shape[0], dtype=torch.float64, device=x.device)
    for block in shards.cached_blocks(x, x.shape[1] + len(candidates)):
        rows = x[block].double()
        distances = torch.addmm(candidates.square().sum(dim=1), rows, candidates.T, alpha=-2)
        distances = (distances + rows.square().sum(dim=1, keepdim=True)).clamp(min=0)
        potentials += torch.minimum(distances, nearest[block, None]).sum(dim=0)
    return dist.sum_across_ranks(potentials)


def _splitmix64(state: Tensor) -> Tensor:
    """One step of SplitMix64 (Steele et al. 2014); int64 products wrap like uint64 ones."""
    z = state + _as_int64(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _as_int64(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(bits: Tensor, places: int) -> Tensor:
    """Logical right shift; torch's operator is an arithmetic shift."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _as_int64(value: int) -> int:
    """The int64 with the same low 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
