"""A loss or gradient that is not finite stops its step, on all ranks, and names slices."""

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from brainray import dist
from brainray.config import AugmentConfig
from brainray.engine.epoch import EpochData
from brainray.engine.finite import (
    GradientWatch,
    NonFiniteStep,
    naming_slices,
    nan_gradient_unless_finite,
)
from brainray.engine.loop import heartbeat, train_epoch
from brainray.engine.shard import CachedImages, PixelScale, SliceShard
from brainray.errors import DivergenceError
from brainray.models.encoder import EncoderOutput
from brainray.models.objective import Objective, StepSizes
from brainray.models.soft_kmeans import SoftKMeans
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


def train_one_epoch(model: FailsOnOneSlice, accumulation: int = 1) -> None:
    images = torch.full((12, 1, 8, 8), 100, dtype=torch.uint8)
    labels = torch.arange(12) % 2
    labelled = SliceShard(CachedImages(images), torch.arange(12), labels)
    white = images.clone()
    white[BAD_ROW] = 255
    unlabelled = SliceShard(CachedImages(white), torch.arange(100, 112), labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_epoch(
        model,
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer),
        EpochData(
            labelled=labelled,
            unlabelled=unlabelled,
            objective=Objective((SoftKMeans(0.1),)),
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


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_the_slice_with_bad_numbers_is_named_and_the_weights_stay_clean(
    value: float, accumulation: int
) -> None:
    model = FailsOnOneSlice(value)
    with pytest.raises(NonFiniteStep) as stop:
        train_one_epoch(model, accumulation)
    assert torch.isfinite(model.weight).all()
    assert 100 + BAD_ROW in stop.value.batch
    # 1e30 is finite, and its square is not: the loss fails, no slice by itself.
    named = stop.value.culprits.tolist()
    assert named == [100 + BAD_ROW] or (value == 1e30 and 100 + BAD_ROW in named)
    assert len(stop.value.batch) == 8 * accumulation


def test_finite_training_is_left_alone() -> None:
    model = FailsOnOneSlice(1.0)
    train_one_epoch(model)
    assert torch.isfinite(model.weight).all()


def test_a_finite_loss_passes_bit_by_bit_and_a_bad_one_poisons_the_gradient() -> None:
    x = torch.tensor([0.1, 0.7], requires_grad=True)
    (expected,) = torch.autograd.grad((x**3).sum(), x)
    (found,) = torch.autograd.grad(nan_gradient_unless_finite((x**3).sum()), x)
    assert torch.equal(expected, found)
    # The gradient of the sum is 1, though the sum is infinite.
    (poisoned,) = torch.autograd.grad(nan_gradient_unless_finite(x.sum() + torch.inf), x)
    assert poisoned.isnan().all()


class OneStep:
    """Three slices, of which the second is not finite, if ``is_bad``, and a loss to which ``added``
    is added.
    """

    num_steps = 1
    keys = torch.tensor([7, 8, 9])

    def __init__(self, *, is_bad: bool = False, added: float = 0.0) -> None:
        self.images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        self.images[1] += torch.nan if is_bad else 0.0
        self.added = added

    def batches(self) -> Iterator["OneStep"]:
        yield self

    def loss(self, output: tuple[Tensor]) -> dict[str, Tensor]:
        return {"total": output[0].mean() + self.added}


class Spreads(nn.Module):
    """Each output depends on all slices of the batch, as with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1))

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (images.mean() * self.weight,)


def train_a_step(step: OneStep) -> Spreads:
    model = Spreads().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    train_epoch(model, optimizer, schedule, step, precision="fp32")
    return model


def test_a_slice_is_named_and_not_those_that_it_spoils() -> None:
    with pytest.raises(NonFiniteStep) as stop:
        train_a_step(OneStep(is_bad=True))
    assert stop.value.culprits.tolist() == [8]


def test_an_infinite_loss_stops_training_though_its_gradient_is_finite() -> None:
    with pytest.raises(NonFiniteStep):
        train_a_step(OneStep(added=torch.inf))


def test_a_model_is_in_training_mode_while_it_is_trained() -> None:
    assert train_a_step(OneStep()).training


def watch_of_a_gpu(bad_step: int, num_steps: int) -> tuple[GradientWatch, list[int]]:
    """After so many updates, or until it stops: then with the step of that, the step that it names,
    and the keys, which are those of the steps.
    """
    weight = nn.Parameter(torch.ones(3))
    watch, stops = GradientWatch([weight], torch.device("meta")), list[int]()
    for step in range(num_steps):
        loss = torch.tensor(torch.nan if step == bad_step else 1.0)
        weight.grad = loss.expand(3)
        watch.saw(torch.tensor([step]), loss, torch.ones(1, 3))
        try:
            watch.check(step)
        except NonFiniteStep as stop:
            stops += [step, stop.step, *stop.batch.tolist()]
            break
    return watch, stops


def test_a_gpu_is_not_waited_for_and_fails_two_updates_later() -> None:
    _, stops = watch_of_a_gpu(bad_step=1, num_steps=6)
    assert stops == [3, 1, 1]


def test_the_last_updates_are_checked_when_an_epoch_ends() -> None:
    watch, stops = watch_of_a_gpu(bad_step=3, num_steps=4)
    assert stops == []
    with pytest.raises(NonFiniteStep, match="step 3"):
        watch.finish()
    watch_of_a_gpu(bad_step=-1, num_steps=4)[0].finish()


def test_an_epoch_ends_with_a_check_of_its_last_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[bool] = []
    monkeypatch.setattr(GradientWatch, "finish", lambda _: finished.append(True))
    train_one_epoch(FailsOnOneSlice(1.0))
    assert finished == [True]


def test_the_error_names_the_step_and_the_slices() -> None:
    ids = [f"{number:032x}" for number in range(0, 20 << 64, 1 << 64)]
    message = {}
    for name, num_culprits in (("culprits", 1), ("batch", 0)):
        stop = NonFiniteStep(2, torch.arange(num_culprits), torch.arange(10))
        with (
            pytest.raises(DivergenceError) as error,
            naming_slices(lambda: ids, where="epoch 3", num_steps=9, remedy="lower it"),
        ):
            raise stop
        message[name] = str(error.value)
    start = "epoch 3, step 3 of 9: the loss or its gradient is NaN or infinite for sample_id "
    assert message["culprits"] == f"{start}{ids[0]}: lower it"
    assert message["batch"] == f"{start}{', '.join(ids[:8])} and 2 more: lower it"


def test_a_long_epoch_tells_its_steps_every_half_minute_but_not_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    on_step = heartbeat("epoch 3", 9)
    for step in range(9):
        now = 10.0 * (step + 1)
        on_step(step)
    assert capsys.readouterr().out.splitlines() == [
        "epoch 3: trained 3 of 9 steps, 60 s left",
        "epoch 3: trained 6 of 9 steps, 30 s left",
    ]


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
