"""What was seen of a test slice, level by level."""

import numpy as np
import pyarrow as pa
import pytest

from brainray.config import PreprocessConfig
from brainray.mri.leakage import Fingerprints, exposure
from brainray.mri.phantom import make_slice
from brainray.mri.resize import thumbnail


def heads(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    images = [make_slice("glioma", rng, 128, "axial").image for _ in range(count)]
    return np.stack([thumbnail(image).ravel() for image in images])


def fingerprints(
    thumbnails: np.ndarray,
    names: str,
    subjects: list[str | None] | None = None,
    source: str = "table",
    elsewhere: list[bool] | None = None,
    groups: list[str | None] | None = None,
) -> Fingerprints:
    subjects = subjects or [None] * len(thumbnails)
    sources = [None if subject is None else source for subject in subjects]
    foreign = np.array(elsewhere or [False] * len(thumbnails), np.bool_)
    groups = groups or [None] * len(thumbnails)
    return Fingerprints(list(names), thumbnails, subjects, sources, foreign, groups)


def test_bytes_fingerprints_and_subjects_are_three_levels() -> None:
    seen = heads(4, seed=0)
    darker = (0.85 * seen[1]).astype(np.uint8)
    mirrored = seen[2].reshape(96, 96)[:, ::-1].ravel()
    stranger = heads(1, seed=7)[0]
    queries = np.stack([seen[0], darker, mirrored, stranger])
    found = exposure(fingerprints(queries, "axyz"), fingerprints(seen, "abcd"), PreprocessConfig())
    assert found.exact.tolist() == [0, -1, -1, -1]
    assert found.twin[1:].tolist() == [1, 2, -1]
    assert found.kind[1:3].tolist() == ["copy", "mirrored"]
    assert found.clean.tolist() == [False, False, True, True]
    assert found.strict.tolist() == [False, False, False, True]


def test_only_names_that_were_given_prove_a_subject() -> None:
    table = pa.table(
        {
            "sample_id": ["a", "b", "c"],
            "subject_id": ["p1", "p2", None],
            "subject_source": ["estimated", "header", None],
            "thumbnail": [row.tobytes() for row in heads(3, seed=0)],
        }
    )
    found = Fingerprints.from_table(table)
    assert list(found.subjects) == [None, "p2", None]
    assert list(found.sources) == [None, "header", None]
    assert not found.elsewhere.any()
    assert list(found.groups) == [None, None, None]
    foreign = table.append_column("elsewhere", pa.array([False, True, False]))
    foreign = foreign.append_column("split_group_id", pa.array(["g", "g", "h"]))
    assert Fingerprints.from_table(foreign).elsewhere.tolist() == [False, True, False]
    assert list(Fingerprints.from_table(foreign).groups) == ["g", None, "h"]


def test_the_same_bytes_are_not_clean_even_if_they_show_nothing() -> None:
    blank = np.full((1, 96 * 96), 7, np.uint8)
    found = exposure(fingerprints(blank, "a"), fingerprints(blank, "a"), PreprocessConfig())
    assert (found.exact.tolist(), found.twin.tolist()) == ([0], [-1])
    assert found.clean.tolist() == [False]


def test_a_mate_is_numbered_among_all_that_was_seen() -> None:
    """Also where only those that are not named otherwise, or of one's group, are compared."""
    seen, stranger = heads(3, seed=0), heads(1, seed=7)
    for queries, known in (
        (fingerprints(seen[2:], "x", ["p9"]), fingerprints(seen, "abc", ["p1", "p2", None])),
        (
            fingerprints(stranger, "x", groups=["g"]),
            fingerprints(seen, "abc", groups=["h", "i", "g"]),
        ),
    ):
        assert exposure(queries, known, PreprocessConfig()).mate.tolist() == [2]


def test_a_slice_of_the_same_name_is_the_mate_whatever_looks_more_alike() -> None:
    seen = heads(2, seed=0)
    queries = fingerprints(seen[:1], "x", ["p1"])
    found = exposure(queries, fingerprints(seen, "ab", [None, "p1"]), PreprocessConfig())
    assert found.mate.tolist() == [1]
    assert found.mate_similarity.tolist() == [1.0]


def test_slices_of_one_group_are_mates_that_do_not_look_alike() -> None:
    seen, strangers = heads(3, seed=0), heads(2, seed=7)
    queries = np.stack([*strangers, seen[2]])
    found = exposure(
        fingerprints(queries, "xyz", groups=["g", "h", "g"]),
        fingerprints(seen, "abc", groups=["g", "g", "i"]),
        PreprocessConfig(),
    )
    assert found.mate[0] in (0, 1)
    assert 0 < found.mate_similarity[0] < 0.65
    assert found.mate[1:].tolist() == [-1, 2]  # alike, whatever group
    assert found.strict.tolist() == [False, True, False]
    named = exposure(
        fingerprints(strangers, "xy", ["p2", None], groups=["g", "g"]),
        fingerprints(seen, "abc", ["p1", "p1", "p1"], groups=["g", "g", "g"]),
        PreprocessConfig(),
    )
    assert named.strict.tolist() == [True, False]  # a name proves another subject


def test_named_subjects_are_compared_by_name_not_by_similarity() -> None:
    seen, queries = heads(3, seed=0), heads(3, seed=7)
    found = exposure(
        fingerprints(queries, "xyz", ["p1", "p9", "p2"]),
        fingerprints(seen, "abc", ["p1", "p2", "p3"]),
        PreprocessConfig(),
    )
    assert found.mate.tolist() == [0, -1, 1]
    assert found.clean.all()
    assert found.strict.tolist() == [False, True, False]


def test_a_named_subject_is_compared_by_similarity_with_unnamed_ones() -> None:
    seen = heads(3, seed=0)
    found = exposure(
        fingerprints(seen, "xyz", ["p1", "p1", None]),
        fingerprints(seen, "abc", [None, "p2", None]),
        PreprocessConfig(),
    )
    assert found.mate.tolist() == [0, -1, 2]
    assert found.mate_similarity[[0, 2]] == pytest.approx(1.0, abs=1e-5)
    assert 0 < found.mate_similarity[1] < 0.65


@pytest.mark.parametrize(
    ("query_source", "seen_source", "mates"),
    [
        ("header", "header", [0, -1]),
        ("header", "table", [0, 1]),  # p2 of the one may be p9 of the other
        ("volume", "volume", [0, 1]),  # a patient may have several files
        ("study", "study", [0, 1]),  # and several studies
    ],
)
def test_names_prove_a_difference_within_one_way_of_naming(
    query_source: str, seen_source: str, mates: list[int]
) -> None:
    seen = heads(2, seed=0)
    found = exposure(
        fingerprints(seen, "xy", ["p1", "p9"], query_source),
        fingerprints(seen, "ab", ["p1", "p2"], seen_source),
        PreprocessConfig(),
    )
    assert found.mate.tolist() == mates


def test_names_of_another_collection_prove_no_difference() -> None:
    seen, flags = heads(3, seed=0), [True, True, False]
    ours = fingerprints(seen, "xyz", ["b-1", "b-2", "b-3"])
    foreign = fingerprints(seen, "abc", ["a-1", "a-2", "a-3"], elsewhere=flags)
    assert exposure(ours, foreign, PreprocessConfig()).mate.tolist() == [0, 1, -1]
    assert exposure(foreign, ours, PreprocessConfig()).mate.tolist() == [0, 1, -1]


def test_a_rotated_copy_is_clean_but_not_strict_whatever_subject_is_named() -> None:
    seen = heads(2, seed=0)
    rotated = np.rot90(seen[0].reshape(96, 96)).reshape(1, -1)
    found = exposure(
        fingerprints(rotated, "x", ["p9"]),
        fingerprints(seen, "ab", ["p1", "p2"]),
        PreprocessConfig(),
    )
    assert (found.kind.tolist(), found.mate.tolist()) == (["rotated"], [-1])
    assert (found.clean.tolist(), found.strict.tolist()) == ([True], [False])


def test_without_names_or_estimates_of_subjects_strict_is_unknown() -> None:
    config = PreprocessConfig.model_validate({"subject": {"estimate": False}})
    seen, strangers = heads(2, seed=0), heads(2, seed=7)
    queries = np.stack([seen[0], *strangers])
    names = ["p8", "p9", None]
    found = exposure(
        fingerprints(queries, "axy", names), fingerprints(seen, "ab", ["p1", "p2"]), config
    )
    assert found.columns["clean"].to_pylist() == [False, True, True]
    assert found.columns["strict"].to_pylist() == [False, True, None]
    found = exposure(
        fingerprints(queries, "axy", names), fingerprints(seen, "ab", [None, "p9"]), config
    )
    assert found.columns["strict"].to_pylist() == [False, False, None]


def test_nothing_seen_leaks_nothing() -> None:
    queries = heads(2, seed=0)
    found = exposure(fingerprints(queries, "xy"), fingerprints(queries[:0], ""), PreprocessConfig())
    assert found.strict.all()
