"""From configuration to the parts of training."""

import pytest
import torch
from torch import nn

from brainray.config import TrainConfig
from brainray.engine.recipe import build_optimizer, image_side
from brainray.engine.shard import PixelScale


def test_slices_grow_in_stages_of_as_many_epochs() -> None:
    config = TrainConfig(image_size=128, start_image_size=64, growth_epochs=4, num_epochs=6)
    assert [image_side(epoch, config) for epoch in range(1, 7)] == [64, 64, 96, 96, 128, 128]
    uneven = TrainConfig(image_size=100, start_image_size=48, growth_epochs=3, num_epochs=4)
    assert [image_side(epoch, uneven) for epoch in range(1, 5)] == [48, 48, 80, 100]


def test_slices_do_not_grow_unless_asked() -> None:
    assert {image_side(epoch, TrainConfig(image_size=128)) for epoch in range(1, 21)} == {128}


def test_resized_slices_are_area_averages() -> None:
    scale = PixelScale(mean=0.5, std=0.25)
    checks = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8).repeat(8, 8)[None, None]
    assert torch.equal(scale.to_unit(checks, 16), scale.to_unit(checks))
    small = scale.to_unit(checks, 4)
    assert small.shape == (1, 1, 4, 4)
    torch.testing.assert_close(small[..., 1:-1, 1:-1], torch.full((1, 1, 2, 2), 0.5))


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
