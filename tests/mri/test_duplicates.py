"""Copies are found, neighbours are not, and ids follow from bytes."""

import faiss
import numpy as np
import pytest

from brainray.benchmarks.duplicates import PERTURBATIONS, fingerprint
from brainray.config import NearDuplicateConfig
from brainray.mri.duplicates import (
    COPY,
    MIRRORED,
    ROTATED,
    DuplicatePairs,
    _candidates,
    _oriented,
    _oriented_descriptors,
    _ranks,
    describe,
    find_twins,
    near_duplicate_pairs,
    pair_similarity,
)
from brainray.mri.phantom import CLASSES, make_series, make_slice

SETTINGS = NearDuplicateConfig()


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [make_slice(CLASSES[number % 4], rng, size=192).image for number in range(12)]


@pytest.fixture(scope="module")
def fingerprints(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([fingerprint(image) for image in images])


@pytest.fixture(scope="module")
def with_copies(images: list[np.ndarray], fingerprints: np.ndarray) -> np.ndarray:
    """And then of slices 1 and 5 a crop, of 2 a mirrored and of 3 a turned copy, and 7 again."""
    rng = np.random.default_rng(3)
    copies = [fingerprint(PERTURBATIONS["crop"][0](images[number], rng)) for number in (1, 5)]
    mirrored = fingerprint(np.ascontiguousarray(images[2][:, ::-1]))
    turned = fingerprint(np.ascontiguousarray(np.rot90(images[3])))
    return np.concatenate([fingerprints, [*copies, mirrored, turned, fingerprints[7]]])


def as_tuples(pairs: DuplicatePairs) -> list[tuple[int, int, int]]:
    columns = pairs.first.tolist(), pairs.second.tolist(), pairs.kind.tolist()
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_copies_are_found_and_named(
    name: str, images: list[np.ndarray], fingerprints: np.ndarray
) -> None:
    perturb, kind = PERTURBATIONS[name]
    rng = np.random.default_rng(2)
    copies = np.stack([fingerprint(perturb(image, rng)) for image in images])
    twins = find_twins(copies, fingerprints, SETTINGS)
    right = (twins.reference == np.arange(len(images))) & (twins.kind == kind)
    assert right.mean() >= (0.8 if name == "mirrored, combined" else 0.9), twins


def test_different_heads_and_neighbouring_slices_stay_apart(fingerprints: np.ndarray) -> None:
    assert len(near_duplicate_pairs(fingerprints, SETTINGS)) == 0
    series = make_series("glioma", np.random.default_rng(2), num_slices=5, size=192)
    neighbours = np.stack([fingerprint(phantom.image) for phantom in series])
    assert len(near_duplicate_pairs(neighbours, SETTINGS)) == 0


def test_pairs_and_twins_agree_and_do_not_depend_on_order(
    fingerprints: np.ndarray, with_copies: np.ndarray
) -> None:
    expected = [(1, 12, COPY), (2, 14, MIRRORED), (3, 15, ROTATED), (5, 13, COPY), (7, 16, COPY)]
    progress: list[tuple[int, int]] = []
    pairs = near_duplicate_pairs(
        with_copies, SETTINGS, on_compared=lambda done, total: progress.append((done, total))
    )
    assert as_tuples(pairs) == expected
    assert progress
    assert progress[-1][0] == progress[-1][1] >= len(expected) - 1  # one is the same to the byte

    shuffle = np.random.default_rng(3).permutation(len(with_copies))
    shuffled = near_duplicate_pairs(with_copies[shuffle], SETTINGS)
    back = [
        (*sorted((int(shuffle[first]), int(shuffle[second]))), kind)
        for first, second, kind in as_tuples(shuffled)
    ]
    assert sorted(back) == expected

    twins = find_twins(with_copies[12:], fingerprints, SETTINGS)
    assert twins.reference.tolist() == [1, 5, 2, 3, 7]
    assert twins.kind.tolist() == [COPY, COPY, MIRRORED, ROTATED, COPY]
    alone = find_twins(with_copies[12:13], fingerprints[::-1], SETTINGS)
    assert alone.reference.tolist() == [len(fingerprints) - 1 - 1]
    np.testing.assert_allclose(alone.similarity, twins.similarity[:1], atol=1e-5)


def test_an_upright_copy_is_preferred_to_a_mirrored_one_that_is_more_alike(
    images: list[np.ndarray], fingerprints: np.ndarray
) -> None:
    crop = fingerprint(PERTURBATIONS["crop"][0](images[0], np.random.default_rng(1)))
    mirrored = fingerprint(np.ascontiguousarray(images[0][:, ::-1]))
    references = np.stack([mirrored, crop])
    alone = [find_twins(fingerprints[:1], references[[row]], SETTINGS) for row in (0, 1)]
    assert alone[0].similarity > alone[1].similarity
    both = find_twins(fingerprints[:1], references, SETTINGS)
    assert (both.reference.tolist(), both.kind.tolist()) == ([1], [COPY])


@pytest.mark.parametrize(
    ("similarity", "turned_similarity", "twin"), [(1.0, 0.99, 0), (0.99, 1.0, -1)]
)
def test_turned_copies_have_a_threshold_of_their_own(
    similarity: float,
    turned_similarity: float,
    twin: int,
    images: list[np.ndarray],
    fingerprints: np.ndarray,
) -> None:
    crop = PERTURBATIONS["crop"][0](images[0], np.random.default_rng(1))
    mirrored = fingerprint(np.ascontiguousarray(crop[:, ::-1]))
    settings = SETTINGS.model_copy(
        update={"similarity": similarity, "turned_similarity": turned_similarity}
    )
    assert find_twins(fingerprints[:1], mirrored[None], settings).reference.tolist() == [twin]


def test_turned_candidates_are_the_best_of_all_orientations(fingerprints: np.ndarray) -> None:
    """Besides those whose descriptors are nearly equal, which take no place of the others."""
    settings = SETTINGS.model_copy(
        update={"descriptor_similarity": -1.0, "num_candidates": 2, "num_turned_candidates": 3}
    )
    found = _candidates(fingerprints[:1], fingerprints[1:], settings)
    turned = found.orientation != 0
    assert (turned.sum(), (~turned).sum()) == (3, 2)
    (slice_,) = describe(fingerprints[:1])
    others = describe(fingerprints[1:])
    every = [float((others @ _oriented_descriptors(slice_[None], o)[0]).max()) for o in range(1, 8)]
    best = [
        float(others[reference] @ _oriented_descriptors(slice_[None], int(orientation))[0])
        for reference, orientation in zip(found.reference, found.orientation, strict=True)
        if orientation
    ]
    assert max(best) == max(every)
    picture = fingerprints[:1].reshape(1, 96, 96)
    copies = np.concatenate([_oriented(picture, orientation) for orientation in (1, 2, 4)])
    references = np.concatenate([copies.reshape(3, -1), fingerprints[1:]])
    one = settings.model_copy(update={"num_turned_candidates": 1})
    found = _candidates(fingerprints[:1], references, one)
    turned = set(found.reference[found.orientation != 0].tolist())
    assert {0, 1, 2} < turned
    assert len(turned) == 4


def test_a_slice_takes_no_place_among_its_own_candidates(with_copies: np.ndarray) -> None:
    settings = SETTINGS.model_copy(update={"num_candidates": 1, "num_turned_candidates": 1})
    found = near_duplicate_pairs(with_copies[[1, 12]], settings)
    assert as_tuples(found) == [(0, 1, COPY)]


def test_a_turned_pair_that_either_slice_finds_is_compared_once(with_copies: np.ndarray) -> None:
    settings = SETTINGS.model_copy(update={"descriptor_similarity": 0.99})
    totals: list[int] = []
    found = near_duplicate_pairs(
        with_copies[[3, 15]], settings, on_compared=lambda _, total: totals.append(total)
    )
    assert as_tuples(found) == [(0, 1, ROTATED)]
    assert set(totals) == {1}


@pytest.mark.parametrize(
    ("axes", "similarity", "kind"), [(1, 0.9, COPY), (1, 1.0, MIRRORED), ((0, 1), 1.0, ROTATED)]
)
def test_a_pair_is_linked_as_it_is_or_else_in_its_most_similar_orientation(
    axes: int | tuple[int, int], similarity: float, kind: int, images: list[np.ndarray]
) -> None:
    """Pictures that are much like their own mirror image, or upside down."""
    image = images[0].astype(np.float64)
    symmetric = (0.55 * image + 0.45 * np.flip(image, axes)).astype(np.uint8)
    turned = np.rot90(symmetric) if kind == ROTATED else np.flip(symmetric, axes)
    pair = np.stack([fingerprint(np.ascontiguousarray(each)) for each in (symmetric, turned)])
    settings = SETTINGS.model_copy(update={"similarity": similarity, "turned_similarity": 0.9})
    found = near_duplicate_pairs(pair, settings)
    assert found.kind.tolist() == [kind]
    assert (found.similarity[0] > 0.9999) == (kind != COPY)


def test_values_are_ranked_within_their_group() -> None:
    ranks = _ranks(np.array([5, 3, 5, 5, 3]), np.array([0.2, 9.0, 0.1, 0.3, 8.0], np.float32))
    assert ranks.tolist() == [1, 1, 0, 2, 0]
    assert _ranks(np.empty(0, np.int64), np.empty(0, np.float32)).tolist() == []


def test_slices_of_one_volume_are_never_linked(fingerprints: np.ndarray) -> None:
    twice = np.concatenate([fingerprints[:2], fingerprints[:2]])
    assert as_tuples(near_duplicate_pairs(twice, SETTINGS)) == [(0, 2, COPY), (1, 3, COPY)]
    volumes = ["a", None, "a", None]
    found = near_duplicate_pairs(twice, SETTINGS, not_together=volumes)
    assert as_tuples(found) == [(1, 3, COPY)]


def test_the_slices_of_a_volume_do_not_hide_those_of_its_copy() -> None:
    rng = np.random.default_rng(5)
    series = [piece.image for piece in make_series("glioma", rng, num_slices=40, size=128)]
    crop = PERTURBATIONS["crop"][0]
    cropped = [crop(image, np.random.default_rng(6)) for image in series]  # one crop of all
    stacked = np.stack([fingerprint(image) for image in [*series, *cropped]])
    volumes = [*["first"] * 40, *["second"] * 40]
    found = near_duplicate_pairs(stacked, SETTINGS, not_together=volumes)
    assert all(first < 40 <= second for first, second, _ in as_tuples(found))
    linked = {(first, second) for first, second, _ in as_tuples(found)}
    assert sum((place, place + 40) in linked for place in range(40)) >= 32


def test_nothing_has_no_twins(fingerprints: np.ndarray) -> None:
    nothing = fingerprints[:0]
    assert len(near_duplicate_pairs(nothing, SETTINGS)) == 0
    assert find_twins(nothing, fingerprints, SETTINGS).reference.shape == (0,)
    assert find_twins(fingerprints, nothing, SETTINGS).reference.tolist() == [-1] * 12


def test_descriptors_turn_with_their_slice(fingerprints: np.ndarray) -> None:
    upright = describe(fingerprints)
    for orientation in range(8):
        turned = _oriented(fingerprints.reshape(-1, 96, 96), orientation)
        expected = describe(np.ascontiguousarray(turned).reshape(len(turned), -1))
        found = _oriented_descriptors(upright, orientation)
        np.testing.assert_allclose(found, expected, atol=1.0)  # integers: rounded at an edge


def test_similarity_does_not_depend_on_which_is_first(
    images: list[np.ndarray], fingerprints: np.ndarray
) -> None:
    rng = np.random.default_rng(4)
    copies = np.stack([fingerprint(PERTURBATIONS["crop"][0](image, rng)) for image in images])
    np.testing.assert_array_equal(
        pair_similarity(fingerprints, copies), pair_similarity(copies, fingerprints)
    )


def test_threads_do_not_change_what_is_found(with_copies: np.ndarray) -> None:
    descriptors = describe(with_copies)
    assert (descriptors == np.rint(descriptors)).all()
    assert (np.square(descriptors).sum(axis=1) < 2**24).all()
    threads = faiss.omp_get_max_threads()
    found = []
    try:
        for count in (1, 4):
            faiss.omp_set_num_threads(count)
            found.append(as_tuples(near_duplicate_pairs(with_copies, SETTINGS)))
    finally:
        faiss.omp_set_num_threads(threads)
    assert found[0] == found[1]
    assert len(found[0]) == 5
