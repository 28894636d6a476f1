"""Matrices that may be larger than memory, stored by rows in a temporary file."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Rows(Protocol):
    """An (N, width) matrix that is read a few rows at a time: an array, or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        """Rows (len(index), width)."""
        ...


def row_blocks(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Blocks of at most ``size`` of the rows (N,)."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@dataclass(frozen=True)
class SelectedRows:
    """A view of some rows of a matrix."""

    matrix: Rows
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[Any]:
        return self.matrix[self.index[index]]


class RowFile:
    """An (N, width) matrix on disk that is indexed like an array, by rows.

    Reads return copies: no part of the matrix is kept in memory. Rows are stored in the order in
    which they are appended, so that blocks are read at once.
    """

    def __init__(self, width: int, dtype: DTypeLike) -> None:
        self.width = width
        self.dtype = np.dtype(dtype)
        # Open for the lifetime of this object.
        self._file = tempfile.TemporaryFile(prefix="brainray-rows-")  # noqa: SIM115
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def append(self, rows: NDArray[Any]) -> None:
        """Append ``rows`` (n, width)."""
        self._write(self._num_rows, rows)
        self._num_rows += len(rows)

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[Any]:
        """Rows (len(index), width)."""
        rows = np.empty((len(index), self.width), self.dtype)
        if len(index) == 0:
            return rows
        # Consecutive rows are read together.
        breaks = np.flatnonzero(np.diff(index) != 1) + 1
        starts, ends = [0, *breaks.tolist()], [*breaks.tolist(), len(index)]
        for start, end in zip(starts, ends, strict=True):
            wanted: Any = rows[start:end].view(np.uint8).reshape(-1)
            first = self._offset(int(index[start]))
            if os.preadv(self._file.fileno(), [wanted], first) < len(wanted):
                raise IndexError(
                    f"row {index[start]} or a later one is out of range of {self._num_rows} rows"
                )
        return rows

    def __setitem__(self, row: int, value: NDArray[Any]) -> None:
        self._write(row, value[None])
        self._num_rows = max(self._num_rows, row + 1)

    def _write(self, row: int, rows: NDArray[Any]) -> None:
        content = np.ascontiguousarray(rows, self.dtype).reshape(len(rows), self.width)
        if os.pwrite(self._file.fileno(), content.data, self._offset(row)) < content.nbytes:
            raise OSError(
                f"no space for {len(rows)} rows in {tempfile.gettempdir()}: free some or set TMPDIR"
            )

    def _offset(self, row: int) -> int:
        return row * self.width * self.dtype.itemsize
