"""Slices of one phantom subject are grouped, strangers are not, whatever order, flip or gain."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from brainray.config import SubjectConfig
from brainray.mri import subjects
from brainray.mri.phantom import CLASSES, make_series
from brainray.mri.row_file import RowFile
from brainray.mri.subjects import (
    COMPARED_SIDE,
    SUBJECT_PREFIX,
    Described,
    Links,
    anatomy_descriptors,
    estimate_subjects,
    find_same_subject,
    merge_links,
    mutual_links,
    same_view_groups,
)

SETTINGS = SubjectConfig()
LEAST = SETTINGS.link_similarity
NUM_SUBJECTS, SERIES_LENGTH = 12, 4

Thumbnails = NDArray[np.uint8]  # (N, 1024)


def shrunk(image: NDArray[np.uint8]) -> Thumbnails:
    size = (COMPARED_SIDE, COMPARED_SIDE)
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA)).ravel()


def flipped(thumbnails: Thumbnails, axes: tuple[int, ...]) -> Thumbnails:
    images = thumbnails.reshape(-1, COMPARED_SIDE, COMPARED_SIDE)
    return np.flip(images, axes).reshape(thumbnails.shape)


@pytest.fixture(scope="module")
def thumbnails() -> Thumbnails:
    """Neighbouring slices side by side, subject after subject."""
    series = [
        make_series(CLASSES[subject % 4], np.random.default_rng([7, subject]), SERIES_LENGTH, 128)
        for subject in range(NUM_SUBJECTS)
    ]
    return np.stack([shrunk(phantom.image) for slices in series for phantom in slices])


def is_known(queries: Thumbnails, references: Thumbnails) -> NDArray[np.bool_]:
    return find_same_subject(queries, references, LEAST).reference >= 0


def ids(count: int) -> list[str]:
    return [f"{number:04d}" for number in range(count)]


def all_components(_: NDArray[np.float32]) -> NDArray[np.float32]:
    """In place of the principal ones, which take seconds: candidates are the nearest."""
    return np.broadcast_to(np.eye(256, dtype=np.float32), (4, 256, 256))


def estimate(thumbnails: Thumbnails, settings: SubjectConfig = SETTINGS) -> list[str]:
    names = ids(len(thumbnails))
    return estimate_subjects(thumbnails, names, names, settings)


def test_a_group_is_one_subject_and_most_neighbours_share_one(thumbnails: Thumbnails) -> None:
    truth = np.arange(len(thumbnails)) // SERIES_LENGTH
    groups = np.array(estimate(thumbnails))
    for group in set(groups):
        assert len(set(truth[groups == group])) == 1
    neighbours = truth[:-1] == truth[1:]
    assert (groups[:-1] == groups[1:])[neighbours].mean() > 0.9


def test_a_group_is_named_by_its_smallest_sample_with_the_prefix(thumbnails: Thumbnails) -> None:
    groups = estimate(thumbnails)
    for group in set(groups):
        members = [name for name, own in zip(ids(len(groups)), groups, strict=True) if own == group]
        assert group == SUBJECT_PREFIX + min(members)


def test_the_order_of_the_input_decides_nothing(thumbnails: Thumbnails) -> None:
    names = np.array(ids(len(thumbnails)))
    order = np.random.default_rng(0).permutation(len(names))
    expected = dict(zip(names, estimate(thumbnails), strict=True))
    shuffled = estimate_subjects(
        thumbnails[order], list(names[order]), list(names[order]), SETTINGS
    )
    assert shuffled == [expected[name] for name in names[order]]


def test_copies_are_of_one_subject_whatever_they_look_like(thumbnails: Thumbnails) -> None:
    pair = thumbnails[[0, SERIES_LENGTH]]  # two strangers
    assert len(set(estimate(pair))) == 2
    assert estimate_subjects(pair, ["b", "a"], ["a", "a"], SETTINGS) == [SUBJECT_PREFIX + "a"] * 2


@pytest.mark.parametrize(("flip", "axes"), [(1, (2,)), (2, (1,)), (3, (1, 2))])
def test_flips_are_sign_changes_of_the_parts(
    thumbnails: Thumbnails, flip: int, axes: tuple[int, ...]
) -> None:
    first, second = thumbnails[:3], thumbnails[1:4]
    descriptors = anatomy_descriptors(np.concatenate([first, flipped(second, axes)]))
    links = mutual_links(
        Described(6, [descriptors]),
        SETTINGS.model_copy(update={"num_neighbours": 5, "link_similarity": -1.0}),
    )
    found = dict(zip(zip(links.first, links.second, strict=True), links.flip, strict=True))
    plain = anatomy_descriptors(np.concatenate([first, second]))
    for row in range(3):
        assert found[row, row + 3] == flip
        value = links.similarity[(links.first == row) & (links.second == row + 3)]
        np.testing.assert_allclose(value, np.vdot(plain[row], plain[row + 3]), atol=1e-5)


def test_mirrored_and_overturned_slices_stay_with_their_subject(thumbnails: Thumbnails) -> None:
    expected = estimate(thumbnails)
    turned = thumbnails.copy()
    for number, axes in enumerate([(2,), (1,), (1, 2)]):
        turned[number::5] = flipped(thumbnails[number::5], axes)
    assert estimate(turned) == expected


def test_a_gain_changes_no_descriptor_and_a_blank_slice_is_like_nothing(
    thumbnails: Thumbnails,
) -> None:
    images = np.concatenate([thumbnails[:1] // 4, thumbnails[:1] // 4 * 4, np.full((2, 1024), 9)])
    descriptors = anatomy_descriptors(images.astype(np.uint8))
    np.testing.assert_allclose(descriptors[0], descriptors[1], atol=1e-4)
    np.testing.assert_array_equal(descriptors[2:], 0)
    assert len(set(estimate(images.astype(np.uint8)[1:]))) == 3


def test_similarity_is_the_correlation_of_local_contrast(thumbnails: Thumbnails) -> None:
    def band(thumbnail: Thumbnails) -> NDArray[np.float64]:
        image = np.sqrt(thumbnail.astype(np.float64)).reshape(COMPARED_SIDE, -1)
        detail = cv2.GaussianBlur(image, (0, 0), 0.5) - cv2.GaussianBlur(image, (0, 0), 2)
        contrast = np.sqrt(cv2.GaussianBlur(np.square(detail), (0, 0), 2))
        return (detail / (contrast + 0.2 * detail.std())).ravel()

    first, second = anatomy_descriptors(thumbnails[:2])
    expected = np.corrcoef(band(thumbnails[0]), band(thumbnails[1]))[0, 1]
    assert np.vdot(first, second) == pytest.approx(expected, abs=1e-5)


def test_candidates_lead_to_the_same_groups_as_comparing_all(
    thumbnails: Thumbnails, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = estimate(thumbnails)
    monkeypatch.setattr(subjects, "EXHAUSTIVE_ROWS", 10)
    assert estimate(thumbnails) == expected
    rows = RowFile(thumbnails[0].size, np.uint8)
    rows.append(thumbnails)
    assert estimate_subjects(rows, ids(len(rows)), ids(len(rows)), SETTINGS) == expected
    every = subjects.find_same_subject(thumbnails[:7], thumbnails[7:], LEAST)
    monkeypatch.undo()
    exact = subjects.find_same_subject(thumbnails[:7], thumbnails[7:], LEAST)
    np.testing.assert_array_equal(every.reference, exact.reference)
    np.testing.assert_allclose(every.similarity, exact.similarity, atol=1e-5)


def test_blocks_lead_to_the_same_groups_as_all_slices_at_once(
    thumbnails: Thumbnails, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = Described(len(thumbnails), [anatomy_descriptors(thumbnails)])
    links = mutual_links(described, SETTINGS)
    views = same_view_groups(described, min_similarity=0.5)
    monkeypatch.setattr(subjects, "_BLOCK_ROWS", 7)
    assert pairs(mutual_links(described, SETTINGS)) == pairs(links)
    np.testing.assert_array_equal(same_view_groups(described, min_similarity=0.5), views)


def test_fewer_slices_than_candidates_are_compared_all_the_same(
    thumbnails: Thumbnails, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = thumbnails[:12]
    expected = estimate(few)
    exact = find_same_subject(thumbnails[12:20], few, LEAST)
    monkeypatch.setattr(subjects, "EXHAUSTIVE_ROWS", 10)
    monkeypatch.setattr(subjects, "_principal_components", all_components)
    assert estimate(few) == expected
    found = find_same_subject(thumbnails[12:20], few, LEAST)
    np.testing.assert_array_equal(found.reference, exact.reference)


def test_a_candidate_counts_once_however_many_flips_find_it() -> None:
    similarity = np.array([[0.9, 0.5, 0.8, 0.7]], np.float32)
    assert subjects._likeliest(similarity, np.array([[3, 1, 3, 2]]), 4).tolist() == [[3, 2, 1, -1]]


# --- Links and merges, on descriptors made by hand ------------------------------------------------


def on_a_circle(*degrees: float) -> Described:
    """Descriptors whose similarity is the cosine of the angle between them."""
    angles = np.deg2rad(degrees)
    descriptors = np.zeros((len(degrees), 4, 256), np.float32)
    descriptors[:, 0, 0], descriptors[:, 0, 1] = np.cos(angles), np.sin(angles)
    return Described(len(degrees), [descriptors])


def pairs(links: Links) -> list[tuple[int, int]]:
    return list(zip(links.first.tolist(), links.second.tolist(), strict=True))


def test_links_are_mutual_neighbours_most_similar_first() -> None:
    # 0 and 10 are nearest to one another; 30 wants 10, 100 is too far from all.
    settings = SETTINGS.model_copy(update={"num_neighbours": 1, "link_similarity": 0.6})
    assert pairs(mutual_links(on_a_circle(0, 30, 10, 100), settings)) == [(0, 2)]
    settings = settings.model_copy(update={"num_neighbours": 2})
    assert pairs(mutual_links(on_a_circle(0, 30, 10, 100), settings)) == [(0, 2), (1, 2), (0, 1)]


def test_a_merge_needs_room_and_likeness_of_the_whole_groups() -> None:
    def chain() -> Described:  # merging uses the descriptors up
        return on_a_circle(0, 40, 79, 121)

    settings = SETTINGS.model_copy(update={"link_similarity": 0.7, "group_similarity": -1.0})
    links = mutual_links(chain(), settings)
    assert pairs(links) == [(1, 2), (0, 1), (2, 3)]
    assert merge_links(chain(), links, settings).tolist() == [0, 0, 0, 0]
    crowded = settings.model_copy(update={"max_slices": 3})
    assert merge_links(chain(), links, crowded).tolist() == [0, 0, 0, 3]
    # 0 is like 40 and 79 by (0.77 + 0.19) / 2 = 0.48 on average, 121 by (0.74 + 0.16) / 2 = 0.45.
    choosy = settings.model_copy(update={"group_similarity": 0.47})
    assert merge_links(chain(), links, choosy).tolist() == [0, 0, 0, 3]
    choosier = settings.model_copy(update={"group_similarity": 0.5})
    assert merge_links(chain(), links, choosier).tolist() == [0, 1, 1, 3]


def test_a_group_is_compared_in_the_frame_of_its_first_slice(thumbnails: Thumbnails) -> None:
    view = thumbnails[:1]
    turned = [view, flipped(view, (2,)), flipped(view, (1, 2)), flipped(view, (2,))]
    described = Described(4, [anatomy_descriptors(np.concatenate(turned))])
    # 0 and 1 differ left to right, 2 and 3 upside down; 1 and 3, which are alike, join the two.
    flips = np.array([1, 2, 0])
    links = Links(np.array([0, 2, 1]), np.array([1, 3, 3]), flips, np.ones(3, np.float32))
    settings = SETTINGS.model_copy(update={"group_similarity": 0.9})
    assert merge_links(described, links, settings).tolist() == [0, 0, 0, 0]


def test_views_are_chains_of_the_nearly_same() -> None:
    groups = same_view_groups(on_a_circle(50, 0, 15, 100, 30), min_similarity=0.95)
    assert groups.tolist() == [0, 1, 1, 3, 1]  # 15 degrees: 0.966, 20 degrees: 0.940


def test_a_view_is_narrower_than_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    described = on_a_circle(0, 30, 60)  # neighbours at 0.87
    monkeypatch.setattr(Described, "of", lambda *_: described)
    settings = SETTINGS.model_copy(update={"max_slices": 1})  # which views alone exceed
    groups = estimate_subjects(np.empty((3, 0), np.uint8), ids(3), ids(3), settings)
    assert len(set(groups)) == 3


def test_a_slice_and_its_flips_are_one_view(thumbnails: Thumbnails) -> None:
    view = thumbnails[:1]
    turned = [view, flipped(view, (2,)), flipped(view, (1,)), flipped(view, (1, 2))]
    described = Described(4, [anatomy_descriptors(np.concatenate(turned))])
    assert same_view_groups(described, min_similarity=0.95).tolist() == [0, 0, 0, 0]


def test_nothing_and_a_single_slice_are_estimated_too(thumbnails: Thumbnails) -> None:
    assert estimate(thumbnails[:0]) == []
    assert estimate(thumbnails[:1]) == [SUBJECT_PREFIX + "0000"]


# --- A later evaluation ---------------------------------------------------------------------------


def test_known_subjects_are_recognised_and_strangers_are_not(thumbnails: Thumbnails) -> None:
    half = len(thumbnails) // 2
    known, strangers = thumbnails[:half], thumbnails[half:]
    assert is_known(known[1::2], known[::2]).mean() > 0.9
    assert is_known(flipped(known[1::2], (2,)), known[::2]).mean() > 0.9
    assert is_known(strangers, known[::2]).mean() < 0.1


def test_the_nearest_of_many_is_named_by_its_row(
    thumbnails: Thumbnails, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = find_same_subject(thumbnails[1::2], thumbnails[::2], LEAST)
    assert len(set(exact.reference.tolist())) > 10
    monkeypatch.setattr(subjects, "EXHAUSTIVE_ROWS", 10)
    monkeypatch.setattr(subjects, "_principal_components", all_components)
    found = find_same_subject(thumbnails[1::2], thumbnails[::2], LEAST)
    np.testing.assert_array_equal(found.reference, exact.reference)


def test_only_the_least_similarity_decides_on_a_match(thumbnails: Thumbnails) -> None:
    queries, references = thumbnails[1::2], thumbnails[::2]
    every, none = (find_same_subject(queries, references, least) for least in (-1.0, 1.0))
    assert (every.reference >= 0).all()
    assert (none.reference == -1).all()
    np.testing.assert_array_equal(every.similarity, none.similarity)


def test_of_no_reference_no_query_is_known(thumbnails: Thumbnails) -> None:
    assert not is_known(thumbnails, thumbnails[:0]).any()
    assert is_known(thumbnails[:0], thumbnails).shape == (0,)
    itself = find_same_subject(thumbnails, thumbnails, LEAST)
    np.testing.assert_array_equal(itself.reference, np.arange(len(thumbnails)))
    np.testing.assert_allclose(itself.similarity, 1.0, atol=1e-5)
