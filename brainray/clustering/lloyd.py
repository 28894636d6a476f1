"""Passes of Lloyd's algorithm over a rank's rows: assignments and the sums of each cluster."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import ThreadpoolController
from torch import Tensor

from brainray import dist
from brainray.clustering import lloyd_cpu, shards
from brainray.clustering.threads import Threads, shares, threads


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
        """Assign each row to the nearest of `centers` (K, D), in the rows' dtype."""

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
    """Assignment with PyTorch operations, on any device: the host waits for none of them."""

    def __init__(self, x: Tensor, num_clusters: int) -> None:
        super().__init__(x)
        # In float64, as otherwise rounding would make results on one and on two ranks diverge.
        self.sums = torch.zeros(num_clusters, x.shape[1], dtype=torch.float64, device=x.device)
        self.counts, self.num_moved = self.sums.new_zeros(num_clusters), self.sums.new_zeros(1)

    def move_rows(self, centers: Tensor) -> None:
        squares = centers.square().sum(dim=1)
        for total in (self.sums, self.counts, self.num_moved):
            total.zero_()
        for block in shards.cached_blocks(self.x, len(centers) + 2 * self.x.shape[1]):
            x, labels = self.x[block], self.labels[block]
            # The squared distance minus the squared norm of the row.
            nearest = torch.addmm(squares, x, centers.T, alpha=-2).argmin(dim=1)
            self.num_moved += (nearest != labels).sum()
            labels.copy_(nearest)
            # A product, since adding to a few rows in turn is slow and in no fixed order on GPUs.
            members = F.one_hot(nearest, len(centers)).double()
            self.sums.addmm_(members.T, x.double())
            self.counts += members.sum(dim=0)

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
