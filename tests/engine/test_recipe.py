"""From configuration to the parts of training."""

import math

import pytest
import torch
from torch import nn

from brainray.config import ObjectiveConfig, TrainConfig
from brainray.engine.recipe import (
    build_objective,
    build_optimizer,
    image_side,
    ramp,
    resolve_precision,
)
from brainray.engine.shard import PixelScale
from brainray.models.consistency import Consistency
from brainray.models.prototype import Prototype
from brainray.models.soft_kmeans import SoftKMeans


def test_an_objective_has_the_weights_and_the_temperature_that_are_configured() -> None:
    config = ObjectiveConfig(
        name="anchored", lambda_consistency=0.3, lambda_cluster=0.7, temperature=0.05
    )
    consistency, prototype = Consistency(0.3), Prototype(0.7, 0.05)
    expected = {
        "anchored": (consistency, prototype),
        "consistency": (consistency,),
        "prototype": (prototype,),
        "joint": (SoftKMeans(0.7),),
        "supervised": (),
    }
    for name, terms in expected.items():
        assert build_objective(config.model_copy(update={"name": name})).terms == terms


def test_the_ramp_rises_as_in_laine_and_aila_and_then_stays() -> None:
    rising = [ramp(epoch, 10) for epoch in (1, 6, 11, 12)]
    assert rising == pytest.approx([math.exp(-5), math.exp(-5 / 4), 1.0, 1.0])
    assert ramp(1, 0) == 1.0


def test_slices_grow_in_stages_of_as_many_epochs() -> None:
    config = TrainConfig(image_size=128, start_image_size=64, growth_epochs=4, num_epochs=6)
    assert [image_side(epoch, config) for epoch in range(1, 7)] == [64, 64, 96, 96, 128, 128]
    uneven = TrainConfig(image_size=100, start_image_size=48, growth_epochs=3, num_epochs=4)
    assert [image_side(epoch, uneven) for epoch in range(1, 5)] == [48, 48, 80, 100]


def test_slices_do_not_grow_unless_asked() -> None:
    assert {image_side(epoch, TrainConfig(image_size=128)) for epoch in range(1, 21)} == {128}


@pytest.mark.parametrize(
    ("pattern", "mean"), [([[0, 255], [255, 0]], 0.5), ([[255, 0, 0, 0]], 0.25)]
)
def test_resized_slices_are_area_averages(pattern: list[list[int]], mean: float) -> None:
    scale = PixelScale(mean=0.5, std=0.25)
    tile = torch.tensor(pattern, dtype=torch.uint8)
    image = tile.repeat(16 // tile.shape[0], 16 // tile.shape[1])[None, None]
    assert torch.equal(scale.to_unit(image, 16), scale.to_unit(image))
    small = scale.to_unit(image, 4)
    assert small.shape == (1, 1, 4, 4)
    torch.testing.assert_close(small[..., 1:-1, 1:-1], torch.full((1, 1, 2, 2), mean))


def test_weights_decay_but_neither_biases_nor_norms() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    optimizer, _ = build_optimizer(model, TrainConfig(weight_decay=0.3), 5)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    decays = {
        name_of[parameter]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decays == dict.fromkeys(name_of.values(), 0.0) | {"0.weight": 0.3, "2.weight": 0.3}


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 5), (0.05, 19), (0.02, 49), (0.3, 1)])
def test_a_schedule_of_any_length_has_a_rise_and_a_fall(warmup: float, steps: int) -> None:
    config = TrainConfig(warmup_fraction=warmup, learning_rate=0.01)
    optimizer, scheduler = build_optimizer(nn.Linear(2, 2), config, steps)
    rates = []
    for _ in range(steps):
        rates += scheduler.get_last_lr()[:1]
        optimizer.step()
        scheduler.step()
    assert all(0 < rate <= 0.01 for rate in rates)


def test_the_rate_that_is_configured_is_reached_after_the_warm_up() -> None:
    config = TrainConfig(warmup_fraction=0.1, learning_rate=0.02)
    optimizer, scheduler = build_optimizer(nn.Linear(2, 2), config, 200)
    rates = []
    for _ in range(200):
        rates += scheduler.get_last_lr()[:1]
        optimizer.step()
        scheduler.step()
    assert max(rates) == pytest.approx(0.02, rel=1e-3)
    assert rates.index(max(rates)) == pytest.approx(20, abs=1)


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_computes_in_bf16_if_it_can(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, precision: str
) -> None:
    capabilities = {"avx2": True, "avx512_bf16": has_bf16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", torch.device("cpu")) == precision
