"""K-means against scikit-learn and faiss: same start, same iterations, same inertia."""

import warnings
from dataclasses import asdict
from typing import NamedTuple

import faiss
import numpy as np
import sklearn.cluster
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from brainray import dist
from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.benchmarks.roofline import Work, measured_peaks
from brainray.benchmarks.samples import embedding_like
from brainray.benchmarks.timing import (
    OURS,
    Timed,
    relative_times,
    side_by_side,
    timed_on_rank,
    two_ranks_against_one,
)
from brainray.clustering.kmeans import KMeans
from brainray.log import log

Matrix = NDArray[np.float32]


class Size(NamedTuple):
    num_rows: int
    num_features: int
    num_clusters: int

    @property
    def iteration(self) -> Work:
        """Work of an iteration: every row is read once and multiplied by every centre."""
        numbers = self.num_rows * self.num_features
        return Work(2.0 * numbers * self.num_clusters, 4.0 * numbers)

    def __str__(self) -> str:
        return f"({self.num_rows:,}, {self.num_features}, K={self.num_clusters})"


SIZES = (Size(6_000, 512, 4), Size(100_000, 64, 16), Size(1_000_000, 64, 64))
QUICK_SIZES = (Size(6_000, 512, 4), Size(100_000, 64, 16), Size(200_000, 64, 64))
COLD_ITERATIONS = 20
DRIFT = 0.1  # movement of rows between epochs, in units of the noise
MAX_INERTIA_DIFFERENCE = 1e-4
MIN_SPEEDUP = 1.0


def run(options: CaseOptions) -> BenchmarkResult:
    """K-means against scikit-learn (Lloyd, Elkan) and faiss, cold and warm, and on two ranks."""
    sizes = QUICK_SIZES if options.quick else SIZES
    measures: list[Measure] = []
    milliseconds: dict[str, dict[str, float]] = {}
    peaks = measured_peaks(torch.float32, torch.device("cpu"))
    for size in sizes:
        rows = embedding_like(size.num_rows, size.num_features, size.num_clusters, options.seed)
        rounds = 9 if size.num_rows <= 10_000 else 3
        cold = rows[np.random.default_rng(options.seed).choice(len(rows), size.num_clusters, False)]
        noise = np.random.default_rng(options.seed + 1).standard_normal(
            rows.shape, dtype=np.float32
        )
        settled = _ours(rows, cold, 100).cluster_centers_.numpy()
        moved = rows + np.float32(DRIFT) * noise
        for start, data, centers in (("cold", rows, cold), ("warm", moved, settled)):
            name = f"{size} {start}"
            num_iter = _ours(data, centers, COLD_ITERATIONS).n_iter_
            found, inertia_gap = _contest(data, centers, num_iter, rounds)
            peers = {peer: value for peer, value in found.items() if peer != OURS}
            best = min(peers, key=lambda peer: peers[peer])
            speedup = peers[best] / found[OURS]
            log(f"{name}: " + ", ".join(f"{k} {1e3 * v:.1f} ms" for k, v in found.items()))
            milliseconds[name] = {peer: 1e3 * value for peer, value in found.items()}
            measures += [
                Measure(f"{name}: against {best}", speedup, "x", at_least=MIN_SPEEDUP),
                Measure(f"{name}: inertia", inertia_gap, at_most=MAX_INERTIA_DIFFERENCE),
                Measure(
                    f"{name}: share of the roofline ({peaks.limit(size.iteration)})",
                    num_iter * peaks.seconds(size.iteration) / found[OURS],
                ),
            ]
    largest = sizes[-1]
    measures += two_ranks_against_one(
        str(largest),
        _timed_shard,
        largest,
        options.seed,
        num_bytes=4 * largest.num_rows * largest.num_features,
        criterion="inertia",
    )
    details = {
        "milliseconds": milliseconds,
        "threads": torch.get_num_threads(),
        "peaks": asdict(peaks),
    }
    return BenchmarkResult(measures, details, relative_times(milliseconds))


def _contest(
    data: Matrix, centers: Matrix, num_iter: int, rounds: int
) -> tuple[dict[str, float], float]:
    """Seconds of each contestant, and the largest relative difference of inertia to ours.

    All run the same number of iterations; those that converge earlier converge to the same result.
    """
    timed = side_by_side(
        {
            OURS: lambda: _ours(data, centers, num_iter).cluster_centers_.numpy(),
            "scikit-learn lloyd": lambda: _sklearn(data, centers, num_iter, "lloyd"),
            "scikit-learn elkan": lambda: _sklearn(data, centers, num_iter, "elkan"),
            "faiss": lambda: _faiss(data, centers, num_iter),
        },
        rounds=rounds,
    )
    inertia = {name: _inertia(data, found.result) for name, found in timed.items()}
    gap = max(abs(value / inertia[OURS] - 1) for value in inertia.values())
    return {name: found.seconds for name, found in timed.items()}, gap


def _ours(data: Matrix, centers: Matrix, num_iter: int) -> KMeans:
    kmeans = KMeans(len(centers), max_iter=num_iter, tol=0.0)
    return kmeans.fit(torch.from_numpy(data), init_centers=torch.from_numpy(centers))


def _sklearn(data: Matrix, centers: Matrix, num_iter: int, algorithm: str) -> Matrix:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        kmeans = sklearn.cluster.KMeans(
            len(centers), init=centers, n_init=1, max_iter=num_iter, tol=0.0, algorithm=algorithm
        )
        return np.asarray(kmeans.fit(data).cluster_centers_, np.float32)


def _faiss(data: Matrix, centers: Matrix, num_iter: int) -> Matrix:
    kmeans = faiss.Kmeans(
        data.shape[1],
        len(centers),
        niter=num_iter,
        min_points_per_centroid=1,
        max_points_per_centroid=len(data),  # use all rows
    )
    kmeans.train(data, init_centroids=centers)
    return np.asarray(kmeans.centroids, np.float32)


def _inertia(data: Matrix, centers: Matrix) -> float:
    wide = centers.astype(np.float64)
    total = 0.0
    for start in range(0, len(data), 16_384):
        rows = data[start : start + 16_384].astype(np.float64)
        squared = np.square(rows).sum(1)[:, None] - 2 * rows @ wide.T + np.square(wide).sum(1)
        total += float(squared.min(axis=1).sum())
    return total


def _timed_shard(size: Size, seed: int) -> Timed:
    """A fit to this rank's share of the rows, and its inertia."""
    rows = torch.from_numpy(embedding_like(*size, seed))
    centers = rows[: size.num_clusters].clone()
    keys = torch.arange(len(rows))[dist.rank() :: dist.world_size()].contiguous()
    mine = rows[dist.rank() :: dist.world_size()].contiguous()
    del rows
    kmeans = KMeans(size.num_clusters, max_iter=COLD_ITERATIONS, tol=0.0)
    timed = timed_on_rank(lambda: kmeans.fit(mine, row_keys=keys, init_centers=centers), rounds=3)
    return Timed(timed.seconds, kmeans.inertia_)
