"""Passes of Lloyd's algorithm over a rank's rows: assignments and the sums of each cluster."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from brainray import dist
from brainray.clustering import lloyd_cpu, shards
from brainray.clustering.threads import Threads, shares, threads

_WIDENED_ELEMENTS = 2**18  # converted to float64 at a time


class Assignment(ABC):
    """Cluster assignment of this rank's rows.

    Attributes:
        labels: (n_rank,) int64, -1 before the first pass.
    """

    def __init__(self, x: Tensor) -> None:
        """``x``: (n_rank, D) rows."""
        self.x = x
        self.labels = torch.full((len(x),), -1, device=x.device)

    @abstractmethod
    def move_rows(self, centers: Tensor) -> None:
        """Assign each row to the nearest of `centers` (K, D), in the rows' dtype.

        In a tie with its current centre, a row stays.
        """

    def totals(self) -> tuple[Tensor, ...]:
        """Sums (K, D) and sizes (K,) of the clusters, and the number of moved rows (1,).

        Totals over all ranks, float64 (a single collective).
        """
        sums, counts, moved = self._local_totals()
        packed = dist.sum_across_ranks(torch.cat([sums.flatten(), counts, moved]))
        parts = torch.split(packed, [sums.numel(), counts.numel(), 1])
        return parts[0].view_as(sums), parts[1], parts[2]

    @abstractmethod
    def _local_totals(self) -> tuple[Tensor, Tensor, Tensor]: ...


@contextmanager
def assignment(x: Tensor, row_squares: Tensor, num_clusters: int) -> Iterator[Assignment]:
    """The assignment for the rows' device: compiled on CPUs, PyTorch on other devices.

    Args:
        x: (n_rank, D) rows.
        row_squares: (n_rank,) their squared norms.
        num_clusters: K.
    """
    if x.device.type != "cpu":
        yield TorchAssignment(x, num_clusters)
        return
    # BLAS would otherwise start its own threads inside each of ours.
    with _libraries().limit(limits=1, user_api="blas"), threads() as ours:
        yield CompiledAssignment(x, row_squares, num_clusters, ours)


@cache
def _libraries() -> ThreadpoolController:
    """The libraries loaded by this process; detecting them takes as long as some passes."""
    return ThreadpoolController()


class TorchAssignment(Assignment):
    """Assignment with PyTorch operations, on any device.

    Only rows that move are summed, and only their nearest centres are searched for: a minimum is
    computed many times faster than its index.
    """

    def __init__(self, x: Tensor, num_clusters: int) -> None:
        super().__init__(x)
        self.is_new = True
        wide = torch.float64
        self.sums = torch.zeros(num_clusters, x.shape[1], dtype=wide, device=x.device)
        self.counts = torch.zeros(num_clusters, dtype=wide, device=x.device)
        self.num_moved = torch.zeros(1, dtype=wide, device=x.device)

    def move_rows(self, centers: Tensor) -> None:
        squares = centers.square().sum(dim=1)
        self.num_moved.zero_()
        for block in shards.cached_blocks(self.x, len(centers)):
            scores = torch.addmm(squares, self.x[block], centers.T, alpha=-2)
            self._move(self.x[block], self.labels[block], scores)
        self.is_new = False

    def _move(self, x: Tensor, labels: Tensor, scores: Tensor) -> None:
        """Move rows x (B, D) to the cluster with the lowest score (B, K), and update labels.

        A score is the squared distance minus the squared norm of the row.
        """
        if self.is_new:
            labels.copy_(scores.argmin(dim=1))
            self._add(x, labels, 1)
            self.num_moved += len(x)
            return
        is_nearer = scores.gather(1, labels[:, None]).squeeze(1) > scores.amin(dim=1)
        moved = torch.nonzero(is_nearer).squeeze(1)
        if len(moved):
            x, nearest = x[moved], scores[moved].argmin(dim=1)
            self._add(x, nearest, 1)
            self._add(x, labels[moved], -1)
            self.num_moved += len(moved)
            labels[moved] = nearest

    def _add(self, rows: Tensor, clusters: Tensor, sign: int) -> None:
        # In float64, as otherwise rounding would make results on one and on two ranks diverge.
        for block in shards.blocks(len(rows), max(_WIDENED_ELEMENTS // rows.shape[1], 1)):
            self.sums.index_add_(0, clusters[block], rows[block].double(), alpha=sign)
        self.counts += sign * torch.bincount(clusters, minlength=len(self.counts))

    def _local_totals(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.sums, self.counts, self.num_moved


class CompiledAssignment(Assignment):
    """Assignment on CPUs: each thread processes those of its rows that may move (`lloyd_cpu`)."""

    def __init__(self, x: Tensor, row_squares: Tensor, num_clusters: int, threads: Threads) -> None:
        super().__init__(x.contiguous())
        self.threads = threads
        self.upper = torch.full_like(row_squares, torch.inf)
        self.lower = torch.zeros_like(row_squares)
        self.largest_square = float(row_squares.amax()) if len(x) else 0.0
        self.centers: lloyd_cpu.Array | None = None
        parts = shares(len(x))
        self.sums = torch.zeros(len(parts), num_clusters, x.shape[1], dtype=torch.float64)
        self.counts = torch.zeros(len(parts), num_clusters, dtype=torch.float64)
        self.num_moved = 0
        row_state = (self.x, row_squares, self.labels, self.upper, self.lower)
        self.parts = [
            [values[rows].numpy() for values in row_state]
            + [sums.numpy() for sums in (self.sums[part], self.counts[part])]
            for part, rows in enumerate(parts)
        ]

    def move_rows(self, centers: Tensor) -> None:
        # NumPy is much faster than PyTorch on such small arrays.
        new = centers.numpy()
        squares = np.square(new).sum(axis=1)
        largest = max(self.largest_square, float(squares.max()))
        slack = np.full(1, 4 * largest * (new.shape[1] + 4) * np.finfo(new.dtype).eps, new.dtype)
        factors = np.ascontiguousarray(-2 * new.T)
        center_arguments = (factors, squares, *self._shifts(new), slack)
        move_rows = lloyd_cpu.compiled(lloyd_cpu.move_rows)
        self.num_moved = sum(
            self.threads.call(move_rows, [(*p, *center_arguments) for p in self.parts])
        )
        self.centers = new

    def _shifts(self, centers: lloyd_cpu.Array) -> tuple[lloyd_cpu.Array, lloyd_cpu.Array]:
        """Shift (K,) of each centre since the last pass, and the largest of the others (K,)."""
        if self.centers is None or len(centers) == 1:  # with a single centre no row can move
            unmoved = np.zeros(len(centers), centers.dtype)
            return unmoved, unmoved
        shifts = np.sqrt(np.square(centers - self.centers).sum(axis=1))
        farthest = int(shifts.argmax())
        others = np.full_like(shifts, shifts[farthest])
        others[farthest] = np.partition(shifts, -2)[-2]
        return shifts, others

    def _local_totals(self) -> tuple[Tensor, Tensor, Tensor]:
        moved = torch.tensor([self.num_moved], dtype=torch.float64)
        return self.sums.sum(dim=0), self.counts.sum(dim=0), moved
