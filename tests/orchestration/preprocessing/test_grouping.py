"""Groups of slices that no store holds, as an evaluation of files from elsewhere meets them."""

import cv2
import numpy as np
import pyarrow as pa
import pytest

from brainray.config import PreprocessConfig, SubjectConfig
from brainray.mri.phantom import make_series
from brainray.mri.resize import thumbnail
from brainray.orchestration.prediction.evaluation import _groups
from brainray.orchestration.preprocessing.grouping import group_strangers

CONFIG = PreprocessConfig()


def accepted(
    images: list[np.ndarray], names: str, subjects: list[str | None] | None = None
) -> pa.Table:
    return pa.table(
        {
            "sample_id": list(names),
            "sha256": list(names),
            "frame": [""] * len(images),
            "label": ["glioma"] * len(images),
            "thumbnail": [thumbnail(np.ascontiguousarray(image)).tobytes() for image in images],
            "subject_id": pa.array(subjects or [None] * len(images), pa.string()),
        }
    )


@pytest.fixture(scope="module")
def series() -> list[list[np.ndarray]]:
    """Three neighbouring slices of each of two subjects."""
    rng = np.random.default_rng(0)
    return [[found.image for found in make_series("glioma", rng, 3)] for _ in range(2)]


def parts(groups: list[str], names: str) -> set[str]:
    """The names of every group, together."""
    return {
        "".join(name for name, other in zip(names, groups, strict=True) if other == group)
        for group in groups
    }


def reencoded(image: np.ndarray) -> np.ndarray:
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE))


def test_copies_and_likely_subjects_are_grouped(series: list[list[np.ndarray]]) -> None:
    first, second = series
    table = accepted([*first, reencoded(first[0]), *second, second[1][:, ::-1]], "abcdefgh")
    groups = group_strangers(table, CONFIG)
    assert parts(groups.copies, "abcdefgh") == {"ad", "b", "c", "e", "f", "g", "h"}
    assert parts(groups.dependent, "abcdefgh") == {"abcd", "efgh"}


def test_names_and_copies_in_any_orientation_are_grouped_without_an_estimate(
    series: list[list[np.ndarray]],
) -> None:
    first, second = series
    images = [*first, second[0], second[2], second[2][:, ::-1]]
    table = accepted(images, "abcdef", ["p1", None, None, "p1", None, None])
    config = CONFIG.model_copy(update={"subject": SubjectConfig(estimate=False)})
    groups = group_strangers(table, config)
    assert parts(groups.dependent, "abcdef") == {"ad", "b", "c", "ef"}


def test_a_copy_of_a_runs_own_test_slice_is_drawn_with_it(series: list[list[np.ndarray]]) -> None:
    first, second = series
    known = {"a": "one", "b": "other"}
    table = accepted([first[0], second[0], reencoded(first[0]), second[1]], "abcd")
    groups = _groups(table, CONFIG, known)
    assert parts([groups[name] for name in "abcd"], "abcd") == {"ac", "bd"}
    assert _groups(table.slice(0, 2), CONFIG, known) == known
