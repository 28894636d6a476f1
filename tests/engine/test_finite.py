"""A loss or gradient that is not finite stops its step, on all ranks, and names slices."""

import pytest
import torch
from torch import Tensor, nn

from brainray import dist
from brainray.config import AugmentConfig
from brainray.engine.epoch import EpochData
from brainray.engine.finite import GradientWatch, NonFiniteStep, nan_gradient_unless_finite
from brainray.engine.loop import train_epoch
from brainray.engine.shard import CachedImages, PixelScale, SliceShard
from brainray.models.encoder import EncoderOutput
from brainray.models.joint import JointObjective
from brainray.models.objective import StepSizes
from tests.engine.targets import uninformed

BAD_ROW = 5


class FailsOnOneSlice(nn.Module):
    """Linear in the mean grey value, but for the one white slice, whose outputs are ``value``."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.value = value

    def forward(self, images: Tensor) -> EncoderOutput:
        means = images.mean(dim=(1, 2, 3))[:, None]
        z = torch.where(means > 0.99, self.value, means) * self.weight
        return EncoderOutput(z=z, logits=z)


def train_one_epoch(value: float, accumulation: int = 1) -> FailsOnOneSlice:
    images = torch.full((12, 1, 8, 8), 100, dtype=torch.uint8)
    labels = torch.arange(12) % 2
    labelled = SliceShard(CachedImages(images), torch.arange(12), labels)
    white = images.clone()
    white[BAD_ROW] = 255
    unlabelled = SliceShard(CachedImages(white), torch.arange(100, 112), labels)
    model = FailsOnOneSlice(value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_epoch(
        model,
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer),
        EpochData(
            labelled=labelled,
            unlabelled=unlabelled,
            objective=JointObjective(0.1),
            targets=uninformed(12, embedding_dim=2),
            sizes=StepSizes(4, 4),
            num_steps=3,
            scale=PixelScale(0.0, 1.0),
            augmentation=AugmentConfig(max_intensity_shift=0.0),
            augmentation_unlabelled=AugmentConfig(policy="none"),
            seed=0,
        ),
        precision="fp32",
        accumulation=accumulation,
    )
    return model


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_the_slice_with_bad_numbers_is_named_and_the_weights_stay_clean(
    value: float, accumulation: int
) -> None:
    with pytest.raises(NonFiniteStep) as stop:
        train_one_epoch(value, accumulation)
    assert 100 + BAD_ROW in stop.value.batch
    # 1e30 is finite, and its square is not: the loss fails, no slice by itself.
    named = stop.value.culprits.tolist()
    assert named == [100 + BAD_ROW] or (value == 1e30 and 100 + BAD_ROW in named)
    assert len(stop.value.batch) == 8 * accumulation


def test_finite_training_is_left_alone() -> None:
    assert torch.isfinite(train_one_epoch(1.0).weight).all()


def test_a_finite_loss_passes_bit_by_bit_and_a_bad_one_poisons_the_gradient() -> None:
    x = torch.tensor([0.1, 0.7], requires_grad=True)
    (expected,) = torch.autograd.grad((x**3).sum(), x)
    (found,) = torch.autograd.grad(nan_gradient_unless_finite((x**3).sum()), x)
    assert torch.equal(expected, found)
    # The gradient of the sum is 1, though the sum is infinite.
    (poisoned,) = torch.autograd.grad(nan_gradient_unless_finite(x.sum() + torch.inf), x)
    assert poisoned.isnan().all()


def step_of_failure() -> tuple[int, list[int]]:
    """Rank 1's loss is NaN at step 2; gradients are averaged as DDP does."""
    weight = nn.Parameter(torch.ones(3))
    watch = GradientWatch([weight], torch.device("cpu"))
    for step in range(4):
        value = torch.full((1, 3), torch.nan if (dist.rank(), step) == (1, 2) else 1.0)
        loss = (weight * value).sum()
        (gradient,) = torch.autograd.grad(nan_gradient_unless_finite(loss), weight)
        weight.grad = dist.sum_across_ranks(gradient) / dist.world_size()
        watch.saw(torch.tensor([10 * dist.rank() + step]), loss, value)
        try:
            watch.check(step)
        except NonFiniteStep as stop:
            return stop.step, dist.gather_rows(stop.culprits).tolist()
    return -1, []


def test_all_ranks_stop_at_one_step_and_name_the_slice_of_one() -> None:
    assert dist.run_on_ranks(step_of_failure, 2) == [(2, [12]), (2, [12])]
