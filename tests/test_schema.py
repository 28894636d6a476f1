"""What may be told of a subset by class."""

from brainray.schema import tells_of_classes


def test_strict_slices_are_told_of_by_class_where_each_has_thirty() -> None:
    assert tells_of_classes([0] * 30 + [1] * 30, "strict")
    assert not tells_of_classes([0] * 30 + [1] * 29, "strict")
    assert tells_of_classes([0], "clean")
    assert not tells_of_classes([], "strict")


def test_unlabelled_slices_are_no_class() -> None:
    assert tells_of_classes([0] * 30 + [1] * 30 + [-1], "strict")
    assert tells_of_classes(["glioma"] * 30 + [None], "strict")
