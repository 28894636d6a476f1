"""Rows of a matrix that may be larger than memory, in a file that goes with the process."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Rows(Protocol):
    """An (N, width) matrix of which some rows are wanted at a time: an array, or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        """Rows (len(index), width)."""
        ...


def row_blocks(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """At most ``size`` of the rows (N,) at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@dataclass(frozen=True)
class SelectedRows:
    """Some rows of a matrix, which is not copied."""

    matrix: Rows
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[Any]:
        return self.matrix[self.index[index]]


class RowFile:
    """An (N, width) matrix on disk that is indexed like an array, by rows.

    What is read is a copy: nothing of the matrix stays in the process's memory. Rows that are
    appended one after another lie one after another, so that blocks are read at a go.
    """

    def __init__(self, width: int, dtype: DTypeLike) -> None:
        self.width = width
        self.dtype = np.dtype(dtype)
        # Open for as long as this object lives.
        self._file = tempfile.TemporaryFile(prefix="brainray-rows-")  # noqa: SIM115
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def append(self, rows: NDArray[Any]) -> None:
        """``rows``: (n, width)."""
        self._write(self._num_rows, rows)
        self._num_rows += len(rows)

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[Any]:
        """Rows (len(index), width)."""
        rows = np.empty((len(index), self.width), self.dtype)
        if len(index) == 0:
            return rows
        # Neighbouring rows are read together.
        breaks = np.flatnonzero(np.diff(index) != 1) + 1
        starts, ends = [0, *breaks.tolist()], [*breaks.tolist(), len(index)]
        for start, end in zip(starts, ends, strict=True):
            wanted: Any = rows[start:end].view(np.uint8).reshape(-1)
            first = self._offset(int(index[start]))
            if os.preadv(self._file.fileno(), [wanted], first) < len(wanted):
                raise IndexError(f"row {index[start]} and on, of {self._num_rows}")
        return rows

    def __setitem__(self, row: int, value: NDArray[Any]) -> None:
        self._write(row, value[None])

    def _write(self, row: int, rows: NDArray[Any]) -> None:
        content = np.ascontiguousarray(rows, self.dtype).reshape(len(rows), self.width)
        if os.pwrite(self._file.fileno(), content.data, self._offset(row)) < content.nbytes:
            raise OSError(f"no room for {len(rows)} rows in {tempfile.gettempdir()}")

    def _offset(self, row: int) -> int:
        return row * self.width * self.dtype.itemsize
