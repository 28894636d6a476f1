"""A matrix on disk that is indexed like one in memory."""

import numpy as np
import pytest

from brainray.mri.row_file import RowFile, SelectedRows

MATRIX = np.arange(60, dtype=np.float32).reshape(12, 5)


@pytest.fixture
def rows() -> RowFile:
    made = RowFile(5, np.float32)
    made.append(MATRIX[:7])
    made.append(MATRIX[7:])
    return made


def test_rows_are_read_in_the_requested_order(rows: RowFile) -> None:
    assert len(rows) == 12
    index = np.array([3, 4, 5, 11, 0, 0, 7, 8])
    np.testing.assert_array_equal(rows[index], MATRIX[index])
    assert rows[index[:0]].shape == (0, 5)
    chosen = SelectedRows(rows, np.array([9, 1]))
    assert len(chosen) == 2
    np.testing.assert_array_equal(chosen[np.array([1, 0, 1])], MATRIX[[1, 9, 1]])


def test_a_row_is_written_in_its_place(rows: RowFile) -> None:
    rows[2] = np.full(5, -1.0)
    assert len(rows) == 12
    np.testing.assert_array_equal(rows[np.array([1, 2, 3])], [MATRIX[1], [-1.0] * 5, MATRIX[3]])


def test_rows_that_are_not_there_are_refused(rows: RowFile) -> None:
    with pytest.raises(IndexError, match="row 12 or a later one is out of range of 12 rows"):
        rows[np.array([12])]
