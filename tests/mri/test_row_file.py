"""A matrix on disk that is indexed like one in memory."""

import os

import numpy as np
import pytest

from brainray.mri.row_file import RowFile, SelectedRows, row_blocks

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


@pytest.mark.parametrize("size", [1, 3, 4, 8, 9])
def test_blocks_leave_no_row_out(size: int) -> None:
    blocks = [block.tolist() for block in row_blocks(np.arange(10, 18), size)]
    assert [row for block in blocks for row in block] == list(range(10, 18))
    assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert len(blocks[-1]) <= size


def test_rows_that_are_not_there_are_refused(rows: RowFile) -> None:
    with pytest.raises(IndexError, match="row 12 or a later one is out of range of 12 rows"):
        rows[np.array([12])]


def test_rows_that_were_not_all_written_are_reported(
    rows: RowFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda _, content, __: len(content) - 1)
    with pytest.raises(OSError, match=r"no space for 7 rows in .*: free some or set TMPDIR"):
        rows.append(MATRIX[:7])
    assert len(rows) == 12
