"""The average of the weights, and its batch statistics."""

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from brainray import dist
from brainray.config import AugmentConfig
from brainray.engine import average as average_module
from brainray.engine.average import MovingAverage, measure_batch_statistics
from brainray.engine.epoch import embed
from brainray.engine.shard import CachedImages, PixelScale
from brainray.models.encoder import Encoder, EncoderOutput
from tests.ranks import OnRanks

SCALE = PixelScale(mean=0.5, std=0.25)
UNCHANGED = AugmentConfig(policy="none")


def test_the_average_follows_the_weights_from_behind() -> None:
    encoder = Encoder("resnet18", num_classes=2)
    average = MovingAverage(encoder, decay=0.75)
    with torch.no_grad():
        for value in (1.0, 5.0, 9.0):
            encoder.head.bias.fill_(value)
            average.update(encoder)
    # The first update copies; then 0.75 * 1 + 0.25 * 5 = 2, and 0.75 * 2 + 0.25 * 9 = 3.75.
    averaged = average.network.state_dict()
    torch.testing.assert_close(averaged["head.bias"], torch.full((2,), 3.75))


def test_an_update_with_several_batches_moves_the_average_as_far_as_several_with_one() -> None:
    encoder = Encoder("resnet18", num_classes=2)
    one, several = (MovingAverage(encoder, decay=0.75) for _ in range(2))
    with torch.no_grad():
        encoder.head.bias.fill_(1.0)
        for average in (one, several):
            average.update(encoder)
        encoder.head.bias.fill_(5.0)
        for _ in range(3):
            one.update(encoder)
        several.update(encoder, 3)
    torch.testing.assert_close(one.network.state_dict(), several.network.state_dict())


def test_the_average_is_pytorchs() -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", num_classes=2)
    ours = MovingAverage(encoder, decay=0.75)
    theirs = AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    for _ in range(3):
        encoder(torch.rand(2, 1, 32, 32))  # moves the batch statistics
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(torch.rand_like(parameter))
        ours.update(encoder)
        theirs.update_parameters(encoder)
    states = zip(ours.network.state_dict().items(), theirs.module.state_dict().items(), strict=True)
    for (name, mine), (_, peer) in states:
        assert torch.equal(mine, peer), name


def measured(encoder: Encoder, slices: CachedImages, *, batch_size: int) -> torch.nn.BatchNorm2d:
    """The first batch normalisation, with statistics of slices of which half are flipped."""
    measure_batch_statistics(
        encoder,
        slices,
        augmentation=AugmentConfig(policy="none", horizontal_flip=1.0),
        scale=SCALE,
        batch_size=batch_size,
        precision="fp32",
    )
    norm = encoder.backbone.bn1
    assert isinstance(norm, torch.nn.BatchNorm2d)
    return norm


def test_batch_statistics_are_of_slices_as_they_are_and_of_augmented_ones() -> None:
    encoder = Encoder("resnet18", num_classes=2)
    images = torch.zeros(23, 1, 32, 32, dtype=torch.uint8)
    images[:, :, :, :9] = 200  # the left side is bright, of a flipped slice the right one
    norm = measured(encoder, CachedImages(images), batch_size=24)
    pixels = SCALE.standardise(SCALE.to_unit(images))
    seen = encoder.backbone.conv1(torch.cat([pixels[:12], pixels[12:].flip(3)]))  # (23, 64, 16, 16)
    torch.testing.assert_close(norm.running_mean, seen.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, seen.var(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    # Batches are of one size, so that a rest of one slice does not count as much as the others.
    by_parts = Encoder("resnet18", num_classes=2)
    by_parts.load_state_dict(encoder.state_dict())
    in_parts = measured(by_parts, CachedImages(images), batch_size=11)
    torch.testing.assert_close(in_parts.running_mean, norm.running_mean, rtol=0.02, atol=0.02)
    assert norm.momentum == 0.1


def mean_of_this_rank(greys: list[list[int]]) -> float:
    """Sum of the means measured on slices of these greys, one list for each rank."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", num_classes=2)
    own = torch.tensor(greys[dist.rank()], dtype=torch.uint8)
    images = own.view(-1, 1, 1, 1).expand(-1, -1, 32, 32)
    norm = measured(encoder, CachedImages(images), batch_size=8)
    assert norm.running_mean is not None
    return float(norm.running_mean.sum())


def test_batch_statistics_are_those_of_all_ranks(on_two_ranks: OnRanks) -> None:
    """In proportion to their slices; one slice, which may have no variance, does not count."""
    dark, bright = [10, 12, 14, 16], [200, 220]
    alone, other = (on_two_ranks(mean_of_this_rank, [part] * 2)[0] for part in (dark, bright))
    both = on_two_ranks(mean_of_this_rank, [dark, bright])
    assert both[0] == both[1] == pytest.approx((4 * alone + 2 * other) / 6, rel=1e-4)
    of_one = on_two_ranks(mean_of_this_rank, [dark, [200]])
    assert of_one == pytest.approx([alone, alone], rel=1e-4)
    assert on_two_ranks(mean_of_this_rank, [[10], [200]]) == [0.0, 0.0]  # unchanged


class Shown(torch.nn.Module):
    """Keeps the batches that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(1)
        self.batches: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> EncoderOutput:
        self.batches.append(self.norm(images) * 0 + images)
        return EncoderOutput(images[:, 0, 0, :2], images[:, 0, 0, :2])


def test_slices_are_embedded_and_measured_at_the_side_that_is_asked_for() -> None:
    shown = Shown()
    images = CachedImages(torch.zeros(8, 1, 32, 32, dtype=torch.uint8))
    embed(shown, images, scale=SCALE, batch_size=8, precision="fp32", side=16)
    assert sum(len(batch) for batch in shown.batches) == 8  # in parts, one for each thread
    measure_batch_statistics(
        shown,
        images,
        augmentation=UNCHANGED,
        scale=SCALE,
        batch_size=8,
        precision="fp32",
        side=16,
    )
    assert {tuple(batch.shape[1:]) for batch in shown.batches} == {(1, 16, 16)}
    assert sum(len(batch) for batch in shown.batches) == 2 * 8


def test_statistics_are_of_a_sample_of_all_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(average_module, "_SLICES_FOR_STATISTICS", 8)
    shown = Shown()
    greys = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(-1, -1, 4, 4)
    measure_batch_statistics(
        shown,
        CachedImages(greys),
        augmentation=UNCHANGED,
        scale=PixelScale(0.0, 1.0),
        batch_size=8,
        precision="fp32",
    )
    rows = (torch.cat(shown.batches)[:, 0, 0, 0] * 255).round()
    assert len(rows.unique()) == 8
    assert rows.max() > 50


def test_views_for_batch_statistics_are_made_in_full_precision() -> None:
    images = torch.randint(0, 256, (8, 1, 64, 64), dtype=torch.uint8)
    seen: dict[str, torch.Tensor] = {}
    for precision in ("fp32", "bf16"):
        encoder = Encoder("resnet18", num_classes=2)

        def keep(_: torch.nn.Module, batch: tuple[torch.Tensor], key: str = precision) -> None:
            seen[key] = batch[0]

        encoder.register_forward_pre_hook(keep)
        measure_batch_statistics(
            encoder,
            CachedImages(images),
            augmentation=AugmentConfig(policy="weak", max_rotation_deg=30.0, max_blur_sigma=1.0),
            scale=SCALE,
            batch_size=8,
            precision=precision,
        )
    assert torch.equal(seen["bf16"], seen["fp32"])


def test_no_batch_of_statistics_is_a_slice_alone() -> None:
    images = torch.zeros(5, 1, 32, 32, dtype=torch.uint8)
    norm = measured(Encoder("resnet18", num_classes=2), CachedImages(images), batch_size=1)
    torch.testing.assert_close(norm.num_batches_tracked, torch.tensor(2))


@pytest.mark.parametrize("num_slices", [0, 1])
def test_without_variance_the_batch_statistics_stay(num_slices: int) -> None:
    encoder = Encoder("resnet18", num_classes=2)
    encoder.backbone.bn1.running_mean.fill_(3.0)
    few = CachedImages(torch.zeros(num_slices, 1, 32, 32, dtype=torch.uint8))
    norm = measured(encoder, few, batch_size=8)
    torch.testing.assert_close(norm.running_mean, torch.full((64,), 3.0))
