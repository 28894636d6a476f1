"""Copies are found, neighbours are not, and ids follow from bytes."""

import hashlib

import cv2
import numpy as np

from brainray.mri.duplicates import (
    content_hash,
    has_near_duplicate,
    most_similar,
    near_duplicate_groups,
    sample_id,
    standardise,
)
from brainray.mri.phantom import make_series, make_slice
from brainray.mri.resize import stretch, thumbnail

THRESHOLD = 0.999


def fingerprint(image: np.ndarray) -> np.ndarray:
    return thumbnail(image).ravel()


def phantoms(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [make_slice("notumor", rng, size=128).image for _ in range(count)]


def recompressed(image: np.ndarray) -> np.ndarray:
    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 50])
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE))


def test_ids_follow_from_the_bytes() -> None:
    digest = content_hash(b"abc")
    assert digest == hashlib.sha256(b"abc").hexdigest()
    assert sample_id(digest) == digest[:32]


def test_standardised_rows_give_correlations() -> None:
    rows = np.random.default_rng(1).integers(0, 255, (3, 1024)).astype(np.uint8)
    rows[2] = 7  # constant: correlates with nothing
    standard = standardise(rows)
    expected = np.corrcoef(rows[:2].astype(float))
    np.testing.assert_allclose(standard[:2] @ standard[:2].T, expected, atol=1e-5)
    np.testing.assert_array_equal(standard[2], 0)


def test_reencoded_resized_and_rescaled_copies_share_a_group() -> None:
    first, second, third = phantoms(3)
    copies = [
        recompressed(first),
        stretch(first, 256),
        np.clip(first * 0.8 + 10, 0, 255).astype(np.uint8),
    ]
    images = [first, second, *copies, third]
    ids = [f"{number:032x}" for number in (5, 4, 3, 2, 1, 0)]
    thumbnails = np.array([fingerprint(image) for image in images])
    groups = near_duplicate_groups(thumbnails, ids, threshold=THRESHOLD)
    assert groups == [ids[4], ids[1], ids[4], ids[4], ids[4], ids[5]]


def test_neighbouring_slices_of_a_subject_stay_apart() -> None:
    series = make_series("glioma", np.random.default_rng(2), num_slices=5, size=128)
    thumbnails = np.array([fingerprint(phantom.image) for phantom in series])
    ids = [f"{number:032x}" for number in range(len(series))]
    assert near_duplicate_groups(thumbnails, ids, threshold=THRESHOLD) == ids


def test_most_similar_agrees_with_numpy_and_handles_nothing() -> None:
    rng = np.random.default_rng(3)
    queries = rng.integers(0, 255, (5, 1024)).astype(np.uint8)
    references = rng.integers(0, 255, (7, 1024)).astype(np.uint8)
    correlation, index = most_similar(queries, references)
    table = np.corrcoef(queries.astype(float), references.astype(float))[:5, 5:]
    np.testing.assert_array_equal(index, table.argmax(axis=1))
    np.testing.assert_allclose(correlation, table.max(axis=1), atol=1e-5)
    assert not has_near_duplicate(queries, references[:0], threshold=THRESHOLD).any()
    assert has_near_duplicate(queries, queries, threshold=THRESHOLD).all()
