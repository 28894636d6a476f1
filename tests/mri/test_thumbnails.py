"""Thumbnails are compared by correlation."""

import numpy as np
import pytest

from brainray.mri.thumbnails import coarse, most_similar, standardise


def test_standardised_rows_give_correlations() -> None:
    rows = np.random.default_rng(1).integers(0, 255, (3, 1024)).astype(np.uint8)
    rows[2] = 7  # constant: correlates with nothing
    standard = standardise(rows)
    expected = np.corrcoef(rows[:2].astype(float))
    np.testing.assert_allclose(standard[:2] @ standard[:2].T, expected, atol=1e-5)
    np.testing.assert_array_equal(standard[2], 0)


def test_coarse_thumbnails_are_rounded_block_means() -> None:
    rows = np.arange(2 * 9216).reshape(2, 96, 96) % 251
    small = coarse(rows.reshape(2, -1).astype(np.uint8)).reshape(2, 32, 32)
    for place, y, x in np.ndindex(small.shape):
        block = rows[place, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3]
        assert small[place, y, x] == round(float(block.mean()))


@pytest.mark.parametrize("block", [2, 100])
def test_most_similar_agrees_with_numpy_and_handles_nothing(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_BLOCK_ROWS", "_BLOCK_COLUMNS"):
        monkeypatch.setattr(f"brainray.mri.thumbnails.{name}", block)
    rng = np.random.default_rng(3)
    queries = rng.integers(0, 255, (5, 1024)).astype(np.uint8)
    references = rng.integers(0, 255, (7, 1024)).astype(np.uint8)
    correlation, index = most_similar(queries, references)
    table = np.corrcoef(queries.astype(float), references.astype(float))[:5, 5:]
    np.testing.assert_array_equal(index, table.argmax(axis=1))
    np.testing.assert_allclose(correlation, table.max(axis=1), atol=1e-5)
    correlation, index = most_similar(queries, references[:0])
    assert correlation.tolist() == [-1] * 5
    assert index.tolist() == [-1] * 5
