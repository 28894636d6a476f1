"""Which subsets have metrics by class."""

from brainray.schema import has_class_support


def test_strict_slices_are_told_of_by_class_where_each_has_thirty() -> None:
    assert has_class_support([0] * 30 + [1] * 30, "strict")
    assert not has_class_support([0] * 30 + [1] * 29, "strict")
    assert has_class_support([0], "clean")
    assert not has_class_support([], "strict")


def test_unlabelled_slices_are_no_class() -> None:
    assert has_class_support([0] * 30 + [1] * 30 + [-1], "strict")
    assert has_class_support(["glioma"] * 30 + [None], "strict")
