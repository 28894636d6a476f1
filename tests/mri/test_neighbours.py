"""Few neighbours are missed where most of the descriptors are not searched."""

import numpy as np
import pytest

from brainray.mri import neighbours
from brainray.mri.neighbours import neighbour_index


def test_most_of_the_nearest_are_found_in_the_cells_that_are_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    _, exact = neighbour_index(rows).search(rows[:300], 5)
    monkeypatch.setattr(neighbours, "_FLAT_ROWS", 100)
    _, found = neighbour_index(rows).search(rows[:300], 5)
    is_found = [np.isin(nearest, some) for nearest, some in zip(exact, found, strict=True)]
    assert 0.6 < np.mean(is_found) < 1  # without groups, which would be found more easily
