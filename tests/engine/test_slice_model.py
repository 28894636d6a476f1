"""New slices beside those that a model was fitted on."""

import numpy as np
import pyarrow as pa

from brainray.engine.slice_model import Reference
from brainray.schema import FITTED, PREDICTED


def predicted(coordinates: list[list[float] | None], likelihoods: list[float | None]) -> pa.Table:
    count = len(coordinates)
    columns = {field.name: pa.nulls(count, field.type) for field in PREDICTED}
    columns |= {
        "head": pa.nulls(count, pa.string()),
        "coordinates": pa.array(coordinates, pa.list_(pa.float32())),
        "log_likelihood": pa.array(likelihoods, pa.float32()),
    }
    return pa.table(columns)


def test_what_is_unlikely_is_an_outlier_and_neighbours_are_near() -> None:
    rows = [("a", [0.0, 0.0], 3.0), ("b", [1.0, 0.0], 1.0), ("c", [0.0, 5.0], 4.0)]
    columns = zip(*[*rows, ("d", [9.0, 9.0], 2.0)], strict=True)
    fitted = pa.table([list(column) for column in columns], schema=FITTED)
    asked = predicted([[0.9, 0.0], None, [8.0, 9.0], [0.0, 5.0]], [0.0, None, 2.5, 5.0])
    found = Reference(fitted).rows(asked)
    assert found["outlier_score"].to_pylist() == [1.0, None, 0.5, 0.0]
    nearest = found["nearest"].to_pylist()
    assert [names and names[0] for names in nearest] == ["b", None, "d", "c"]
    distances = found["nearest_distance"].to_pylist()
    np.testing.assert_allclose(distances[0][:2], [0.1, 0.9], atol=1e-5)
    assert distances[1] is None


def test_without_fitted_slices_nothing_is_said_of_neighbours() -> None:
    for fitted in (None, FITTED.empty_table()):
        reference = Reference(fitted)
        assert reference.is_empty
        found = reference.rows(predicted([[0.0]], [1.0]))
        assert found["outlier_score"].to_pylist() == found["nearest"].to_pylist() == [None]
