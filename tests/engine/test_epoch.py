"""One pass of training and of inference."""

import math
from dataclasses import replace
from typing import cast

import pytest
import torch

from brainray.config import AugmentConfig, TrainConfig
from brainray.engine import recipe
from brainray.engine.average import MovingAverage
from brainray.engine.epoch import (
    EpochData,
    EpochPlan,
    embed,
    plan_epoch,
)
from brainray.engine.loop import train_epoch
from brainray.engine.recipe import build_optimizer, resolve_precision
from brainray.engine.shard import CachedImages, PixelScale, SliceShard, StreamedImages, sample_keys
from brainray.models.encoder import Encoder, EncoderOutput
from brainray.models.mixup import Mixup
from brainray.models.objective import Objective, StepOutputs, StepSizes, Targets
from brainray.models.soft_kmeans import SoftKMeans
from tests.engine.targets import uninformed

SCALE = PixelScale(mean=0.5, std=0.25)
UNCHANGED = AugmentConfig(policy="none")


def shard(num: int, seed: int = 0) -> SliceShard:
    """Slices of two classes that differ in brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 2
    noise = torch.randint(0, 60, (num, 1, 32, 32), generator=generator)
    images = (noise + 120 * labels[:, None, None, None]).to(torch.uint8)
    return SliceShard(CachedImages(images), torch.arange(num), labels)


def streamed(cached: SliceShard) -> SliceShard:
    """The same slices in a file."""
    assert isinstance(cached.images, CachedImages)
    images = StreamedImages(len(cached), cached.images.images.shape[-1], torch.device("cpu"))
    for row, image in enumerate(cached.images.images):
        images.put(row, image[0].numpy())
    return SliceShard(images, cached.keys, cached.labels)


def plan(num_labelled: int, num_unlabelled: int, num_ranks: int = 1) -> EpochPlan:
    batch = StepSizes(32, 64)
    return plan_epoch(Objective((SoftKMeans(1.0),)), num_labelled, num_unlabelled, batch, num_ranks)


def test_an_epoch_is_one_pass_over_the_unlabelled_slices_of_all_ranks() -> None:
    assert plan(200, 1000).num_steps == math.ceil(1000 / 64)
    assert plan(200, 1000, num_ranks=2).num_steps == math.ceil(1000 / 128)
    assert plan(10, 64) == EpochPlan(1, StepSizes(32, 64), True)


def test_as_many_unlabelled_slices_as_labelled_ones_make_the_epoch() -> None:
    assert plan(640, 640) == EpochPlan(10, StepSizes(32, 64), True)


def test_ranks_without_an_unlabelled_slice_are_not_asked_for_one() -> None:
    few = plan_epoch(Objective((SoftKMeans(1.0),)), 100, 3, StepSizes(2, 2), num_ranks=4)
    assert few.sizes == StepSizes(4, 0)


def test_the_control_has_as_many_steps_and_images() -> None:
    control = plan_epoch(Objective(), 200, 1000, StepSizes(32, 64), num_ranks=1)
    assert control == replace(plan(200, 1000), sizes=StepSizes(96, 0))


def test_a_few_unlabelled_slices_do_not_make_an_epoch() -> None:
    """As of a data set that is labelled but for what nobody could tell."""
    num_steps = math.ceil(3428 / 32)
    assert plan(3428, 0) == EpochPlan(num_steps, StepSizes(96, 0), False)
    assert plan(3428, 63) == EpochPlan(num_steps, StepSizes(96, 0), False)
    assert plan(3428, 64) == EpochPlan(num_steps, StepSizes(32, 64), False)


@pytest.mark.parametrize("num_unlabelled", [63, 64, 255])
def test_the_number_of_ranks_does_not_change_the_loss(num_unlabelled: int) -> None:
    one, four = (plan(3428, num_unlabelled, num_ranks=num_ranks) for num_ranks in (1, 4))
    assert one.sizes == four.sizes
    assert four.num_steps == math.ceil(3428 / (4 * 32))


def train(
    seed: int,
    *,
    streaming: bool = False,
    accumulation: int = 1,
    view: AugmentConfig = UNCHANGED,
    ema_decay: float = 0.0,
    is_compiled: bool = False,
) -> tuple[Encoder, dict[str, float]]:
    """The encoder, or its average, and the losses."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", num_classes=2)
    if is_compiled:
        encoder.compile(backend="aot_eager")  # traces as on a GPU, but generates no code
    optimizer, scheduler = build_optimizer(encoder, TrainConfig(), total_steps=6)
    labelled, unlabelled = shard(12), shard(24, seed=1)
    average = MovingAverage(encoder, ema_decay) if ema_decay else None
    updates: list[int] = []

    def update(num_batches: int) -> None:
        updates.append(num_batches)
        if average is not None:
            average.update(encoder, num_batches)

    if streaming:
        labelled, unlabelled = streamed(labelled), streamed(unlabelled)
    result = train_epoch(
        encoder,
        optimizer,
        scheduler,
        EpochData(
            labelled=labelled,
            unlabelled=unlabelled,
            objective=Objective((SoftKMeans(0.1),)),
            targets=uninformed(24, embedding_dim=512),
            sizes=StepSizes(8, 8),
            num_steps=6,
            scale=SCALE,
            augmentation=AugmentConfig(max_intensity_shift=0.0),
            augmentation_unlabelled=view,
            seed=seed,
        ),
        precision="fp32",
        accumulation=accumulation,
        on_update=update,
    )
    assert 0 < result.data_wait_s < 60
    assert scheduler.last_epoch == -(-6 // accumulation)
    assert updates == [min(accumulation, 6 - done) for done in range(0, 6, accumulation)]
    return encoder if average is None else average.network, result.losses


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_step_learns_is_that_of_its_slices(streaming: bool) -> None:
    labelled, unlabelled = shard(12), shard(24, seed=1)
    images = {
        role: cast(CachedImages, of.images).images
        for role, of in (("labelled", labelled), ("unlabelled", unlabelled))
    }
    if streaming:
        labelled, unlabelled = streamed(labelled), streamed(unlabelled)
    row = torch.arange(24)
    targets = Targets(
        responsibilities=torch.stack([row / 24, 1 - row / 24], dim=1),
        pseudo_labels=row % 3,
        confidences=row / 24,
        centers=torch.eye(2),
        class_of_cluster=torch.arange(2),
        ramp=1.0,
    )
    data = EpochData(
        labelled=labelled,
        unlabelled=unlabelled,
        objective=Objective((SoftKMeans(0.1),)),
        targets=targets,
        sizes=StepSizes(8, 8),
        num_steps=6,
        scale=SCALE,
        augmentation=UNCHANGED,
        augmentation_unlabelled=UNCHANGED,
        seed=5,
        side=16,
    )
    passed: list[int] = []
    for batch in data.batches():
        first, rest = batch.keys.split(8)
        assert torch.equal(batch.labels, labelled.labels[first])
        for name in ("responsibilities", "pseudo_labels", "confidences"):
            assert torch.equal(getattr(batch.targets, name), getattr(targets, name)[rest]), name
        shown = torch.cat([images["labelled"][first], images["unlabelled"][rest]])
        assert torch.equal(batch.images, SCALE.standardise(SCALE.to_unit(shown, 16)))
        assert batch.images.shape[-2:] == (16, 16)
        passed += rest.tolist()
    for begin in (0, 24):  # each pass has every slice once
        assert sorted(passed[begin : begin + 24]) == list(range(24))


def test_a_step_has_the_ramp_of_its_epoch() -> None:
    targets = uninformed(3, embedding_dim=2)._replace(ramp=0.25)
    assert targets.of_rows(torch.tensor([2])).ramp == 0.25


def two_steps() -> EpochData:
    """Without augmentation."""
    return EpochData(
        labelled=shard(12),
        unlabelled=shard(24, seed=1),
        objective=Objective((SoftKMeans(0.1),)),
        targets=uninformed(24, embedding_dim=2),
        sizes=StepSizes(8, 8),
        num_steps=2,
        scale=SCALE,
        augmentation=UNCHANGED,
        augmentation_unlabelled=UNCHANGED,
        seed=5,
    )


def test_labelled_slices_are_mixed_anew_in_each_step_and_unlabelled_ones_are_not() -> None:
    data = replace(two_steps(), mixup_alpha=0.4)
    mixups = list[Mixup]()
    for batch in data.batches():
        assert batch.mixup is not None
        mixups.append(batch.mixup)
        (plain,) = data.labelled.images.batches([batch.keys[:8]])
        (rest,) = data.unlabelled.images.batches([batch.keys[8:]])
        views = torch.cat([batch.mixup.images(SCALE.to_unit(plain)), SCALE.to_unit(rest)])
        torch.testing.assert_close(batch.images, SCALE.standardise(views))
    assert mixups[0].share != mixups[1].share


def test_the_loss_of_mixed_slices_is_of_both_labels() -> None:
    batch = next(replace(two_steps(), mixup_alpha=0.4).batches())
    assert batch.mixup is not None
    logits = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    z = torch.zeros(16, 2)
    outputs = StepOutputs(EncoderOutput(z[:8], logits[:8]), EncoderOutput(z[8:], logits[8:]))
    expected = batch.mixup.loss(batch.objective, outputs, batch.labels, batch.targets)
    assert batch.loss(EncoderOutput(z, logits)) == expected
    plain = batch.objective.loss(outputs, batch.labels, batch.targets)
    assert expected["ce"] != plain["ce"]


def test_labelled_and_unlabelled_slices_have_orders_of_their_own() -> None:
    data = replace(two_steps(), labelled=shard(24), num_steps=3, mixup_alpha=0.4)
    labelled, unlabelled = torch.stack([batch.keys for batch in data.batches()]).split(8, dim=1)
    assert not torch.equal(labelled, unlabelled)


def test_a_batch_of_more_slices_than_are_labelled_has_them_repeatedly() -> None:
    batches = list(replace(two_steps(), labelled=shard(3)).batches())
    assert [len(batch.labels) for batch in batches] == [8, 8]
    drawn = torch.cat([batch.keys[:8] for batch in batches])
    assert sorted(torch.bincount(drawn, minlength=3).tolist()) == [5, 5, 6]


@pytest.mark.slow
def test_a_compiled_encoder_learns_the_same() -> None:
    _, losses = train(seed=5)
    _, compiled = train(seed=5, is_compiled=True)
    assert compiled == pytest.approx(losses, rel=1e-3)


def test_training_follows_its_seed_to_the_last_bit() -> None:
    first, losses = train(seed=5)
    again, losses_again = train(seed=5)
    other, _ = train(seed=6)
    assert losses == losses_again
    for one, two in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_averaging_leaves_the_training_alone() -> None:
    plain, losses = train(seed=5)
    averaged, losses_averaged = train(seed=5, ema_decay=0.9)
    assert losses == losses_averaged
    assert not torch.equal(plain.head.weight, averaged.head.weight)


def test_streamed_slices_train_the_same_encoder() -> None:
    cached, losses = train(seed=5)
    from_file, losses_from_file = train(seed=5, streaming=True)
    assert losses == losses_from_file
    for one, two in zip(cached.parameters(), from_file.parameters(), strict=True):
        assert torch.equal(one, two)


def test_streamed_batches_are_the_rows_asked_for() -> None:
    cached = shard(10)
    order = [torch.tensor([3, 9, 3]), torch.tensor([0]), torch.tensor([], dtype=torch.int64)]
    for one, two in zip(
        cached.images.batches(order), streamed(cached).images.batches(order), strict=True
    ):
        assert one.dtype == two.dtype == torch.uint8
        assert torch.equal(one, two)


class Weighted(torch.nn.Module):
    """An encoder without batch normalisation, whose gradient is linear in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, images: torch.Tensor) -> EncoderOutput:
        means = images.mean(dim=(1, 2, 3), keepdim=False)[:, None]
        return EncoderOutput(z=means * self.weight, logits=means * self.weight)


def test_unlabelled_slices_are_augmented_by_their_own_policy() -> None:
    seen: list[torch.Tensor] = []

    class Recorder(Weighted):
        def forward(self, images: torch.Tensor) -> EncoderOutput:
            seen.append(images)
            return super().forward(images)

    for view in (UNCHANGED, AugmentConfig(policy="strong")):
        model = Recorder()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        train_epoch(
            model,
            optimizer,
            torch.optim.lr_scheduler.ConstantLR(optimizer),
            replace(
                two_steps(),
                labelled=shard(8),
                sizes=StepSizes(8, 24),
                num_steps=1,
                augmentation_unlabelled=view,
                seed=3,
            ),
            precision="fp32",
        )
    plain, augmented = seen
    assert torch.equal(plain[:8], augmented[:8])
    assert not any(torch.equal(one, two) for one, two in zip(plain[8:], augmented[8:], strict=True))


def test_accumulated_batches_give_the_gradient_of_their_mean() -> None:
    gradients = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            gradients.append(self.param_groups[0]["params"][0].grad.clone())

    for accumulation in (1, 4):
        model = Weighted()
        optimizer = Recorder(model.parameters(), lr=0.0)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        train_epoch(
            model,
            optimizer,
            schedule,
            replace(two_steps(), num_steps=6, augmentation=AugmentConfig(), seed=3),
            precision="fp32",
            accumulation=accumulation,
        )
    single, accumulated = gradients[:6], gradients[6:]
    assert len(accumulated) == 2  # four batches, then the two that are left
    torch.testing.assert_close(accumulated[0], torch.stack(single[:4]).mean(dim=0))
    torch.testing.assert_close(accumulated[1], torch.stack(single[4:]).mean(dim=0))


def test_losses_are_means_and_add_up() -> None:
    _, losses = train(seed=5)
    assert set(losses) == {"total", "ce", "cluster"}
    assert math.isclose(losses["total"], losses["ce"] + 0.1 * losses["cluster"], rel_tol=1e-5)
    # Centres at the origin are at distance 1 from every normalised embedding.
    assert math.isclose(losses["cluster"], 1.0, rel_tol=1e-5)


def test_embedding_in_batches_equals_embedding_at_once() -> None:
    encoder = Encoder("resnet18", num_classes=2)
    images = shard(10).images
    whole = embed(encoder, images, scale=SCALE, batch_size=10, precision="fp32")
    parts = embed(encoder, images, scale=SCALE, batch_size=3, precision="fp32")
    torch.testing.assert_close(whole.z, parts.z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.logits, parts.logits, rtol=1e-4, atol=1e-4)
    nothing = embed(encoder, shard(0).images, scale=SCALE, batch_size=3, precision="fp32")
    assert nothing.z.shape == (0, 512)
    assert nothing.logits.shape == (0, 2)


def test_bf16_embeddings_are_close_to_fp32() -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", num_classes=2)
    images = shard(8).images
    exact = embed(encoder, images, scale=SCALE, batch_size=8, precision="fp32").z
    coarse = embed(encoder, images, scale=SCALE, batch_size=8, precision="bf16").z
    assert coarse.dtype == torch.float32
    assert float((exact * coarse).sum(dim=1).min()) > 0.999


def test_standardised_pixels_by_hand() -> None:
    image = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2)
    standard = SCALE.standardise(SCALE.to_unit(image))
    torch.testing.assert_close(standard.flatten(), torch.tensor([-2.0, 2.0]))


def test_keys_are_the_leading_bits_of_sample_ids() -> None:
    keys = sample_keys(["0" * 15 + "a" + "f" * 16, "f" * 32])
    assert keys.tolist() == [10, -1]


@pytest.mark.parametrize(("num_without", "precision"), [(0, "bf16"), (1, "fp32")])
def test_all_ranks_of_a_run_compute_in_one_precision(
    monkeypatch: pytest.MonkeyPatch, num_without: int, precision: str
) -> None:
    monkeypatch.setattr(recipe, "resolve_precision", lambda *_: "bf16")  # of this rank
    monkeypatch.setattr(recipe, "sum_across_ranks", lambda of_this: of_this + num_without)
    assert recipe.agreed_precision("auto", torch.device("cpu")) == precision


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_chosen_precision_stands(precision: str) -> None:
    assert resolve_precision(precision, torch.device("cpu")) == precision
    assert resolve_precision("auto", torch.device("cpu")) in {"bf16", "fp32"}
