"""New slices: at what size they are predicted, and beside those that a model was fitted on."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from brainray.config import TrainConfig
from brainray.engine.epoch import embed
from brainray.engine.shard import CachedImages
from brainray.engine.slice_model import Reference, SliceModel
from brainray.schema import FITTED, PREDICTED_SLICES, matrix_of
from tests.engine.test_state import checkpoint


def predicted(coordinates: list[list[float] | None], likelihoods: list[float | None]) -> pa.Table:
    count = len(coordinates)
    columns = {field.name: pa.nulls(count, field.type) for field in PREDICTED_SLICES}
    columns |= {
        "head": pa.nulls(count, pa.string()),
        "coordinates": pa.array(coordinates, pa.list_(pa.float32())),
        "log_likelihood": pa.array(likelihoods, pa.float32()),
    }
    return pa.table(columns)


def test_while_slices_grow_new_ones_are_predicted_at_the_size_of_the_epoch() -> None:
    torch.manual_seed(0)
    saved, _ = checkpoint()
    growing = {"image_size": 64, "start_image_size": 32, "growth_epochs": 8, "num_epochs": 10}
    config = saved.config.model_copy(update={"train": TrainConfig.model_validate(growing)})
    model = SliceModel(replace(saved, config=config, epoch=1), torch.device("cpu"), "fp32")
    pixels = torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8)
    columns: dict[str, Any] = {name: ["a", "b", "c"] for name in ("sample_id", "path", "frame")}
    columns |= {name: pa.nulls(3, pa.string()) for name in ("label", "reason")}
    columns |= {"height": [64] * 3, "width": [64] * 3, "thumbnail": [bytes(96 * 96)] * 3}
    columns["image"] = [image.numpy().tobytes() for image in pixels]
    found = matrix_of(model.predict(pa.table(columns))["embedding"])
    expected = embed(
        saved.encoder,
        CachedImages(pixels),
        scale=saved.scale,
        batch_size=3,
        precision="fp32",
        side=32,
    )
    np.testing.assert_allclose(found, expected.z.numpy(), atol=1e-5)


def test_what_is_unlikely_is_an_outlier_and_neighbours_are_near() -> None:
    rows = [("a", [0.0, 0.0], 3.0), ("b", [1.0, 0.0], 1.0), ("c", [0.0, 5.0], 4.0)]
    columns = zip(*[*rows, ("d", [9.0, 9.0], 2.0)], strict=True)
    fitted = pa.table([list(column) for column in columns], schema=FITTED)
    asked = predicted([[0.9, 0.0], None, [8.0, 9.0], [0.0, 5.0]], [0.0, None, 2.0, 5.0])
    found = Reference(fitted).rows(asked)
    assert found["outlier_score"].to_pylist() == [1.0, None, 0.5, 0.0]  # d is no more likely
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
