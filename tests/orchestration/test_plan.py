"""What a store will hold, decided from the light columns alone."""

import numpy as np
import pyarrow as pa

from brainray.config import Config
from brainray.orchestration.plan import plan_store
from brainray.schema import IMAGE_STORE


def index(test_label: str) -> pa.Table:
    """Two training slices of each of two classes; the test slice copies the first of them."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, 1024).astype(np.uint8).tobytes() for _ in range(4)]
    labels = ["a", "a", "b", "b", test_label]
    copies = [0, 1, 2, 3, 0]
    return pa.table(
        {
            "path": [f"{number}.jpg" for number in range(5)],
            "reason": pa.nulls(5, pa.string()),
            "sha256": [str(number).ljust(64, "0") for number in copies],
            "label": labels,
            "subject_id": pa.nulls(5, pa.string()),
            "source_split": ["train"] * 4 + ["test"],
            "pixel_sum": [1000] * 5,
            "pixel_square_sum": [9_000_000] * 5,
            "thumbnail": pa.array(
                [pictures[number] for number in copies], IMAGE_STORE.field("thumbnail").type
            ),
        }
    )


def test_a_test_label_decides_nothing_about_its_training_twin() -> None:
    agreeing, conflicting = (plan_store(index(label), Config()) for label in ("a", "b"))
    for plan in (agreeing, conflicting):
        assert plan.rows["label"].to_pylist()[:4] == ["a", "a", "b", "b"]
    assert agreeing.leakage["label_conflicts"] == []
    assert conflicting.leakage["label_conflicts"] == ["0.jpg", "4.jpg"]
