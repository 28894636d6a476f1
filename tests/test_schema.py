"""Which subsets are known, and which have metrics by class; columns of vectors as matrices."""

import numpy as np
import pyarrow as pa

from brainray.schema import has_class_support, matrix_of, subset_masks


def test_a_subset_to_which_some_slice_may_or_may_not_belong_is_unknown() -> None:
    slices = pa.table({"clean": [True, False], "strict": [False, None]})
    masks = {name: mask.tolist() for name, mask in subset_masks(slices).items()}
    assert masks == {"all": [True, True], "clean": [True, False]}


def test_strict_slices_are_told_of_by_class_where_each_has_thirty() -> None:
    assert has_class_support([0] * 30 + [1] * 30, "strict")
    assert not has_class_support([0] * 30 + [1] * 29, "strict")
    assert has_class_support([0], "clean")
    assert not has_class_support([], "strict")


def test_unlabelled_slices_are_no_class() -> None:
    assert has_class_support([0] * 30 + [1] * 30 + [-1], "strict")
    assert has_class_support(["glioma"] * 30 + [None], "strict")


def test_the_lists_of_a_column_are_the_rows_of_a_matrix_whatever_its_chunks() -> None:
    chunks = [[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]]
    column = pa.chunked_array(chunks, pa.list_(pa.float32()))
    np.testing.assert_array_equal(matrix_of(column), [[1, 2, 3], [4, 5, 6]])
