"""One pass of training and of inference."""

import math

import pytest
import torch

from brainray.config import AugmentConfig, TrainConfig
from brainray.engine.epoch import SoftTargets, embed, num_steps, train_epoch
from brainray.engine.recipe import build_optimizer, resolve_precision
from brainray.engine.shard import PixelScale, SliceShard, sample_keys
from brainray.models.encoder import Encoder
from brainray.models.joint import JointObjective
from brainray.models.objective import StepSizes

SCALE = PixelScale(mean=0.5, std=0.25)


def shard(num: int, seed: int = 0) -> SliceShard:
    """Slices of two classes that differ in brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 2
    noise = torch.randint(0, 60, (num, 1, 32, 32), generator=generator)
    images = (noise + 120 * labels[:, None, None, None]).to(torch.uint8)
    return SliceShard(images, torch.arange(num), labels)


def test_an_epoch_is_one_pass_over_the_unlabelled_slices_of_all_ranks() -> None:
    assert num_steps(1000, 64, num_ranks=1) == math.ceil(1000 / 64)
    assert num_steps(1000, 64, num_ranks=2) == math.ceil(1000 / 128)
    assert num_steps(64, 64, num_ranks=1) == 1


def train(seed: int) -> tuple[Encoder, dict[str, float]]:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", num_classes=2)
    optimizer, scheduler = build_optimizer(encoder, TrainConfig(), total_steps=6)
    unlabelled = shard(24, seed=1)
    soft = SoftTargets(torch.full((24, 2), 0.5), torch.zeros(2, 512))
    result = train_epoch(
        encoder,
        optimizer,
        scheduler,
        JointObjective(0.1),
        shard(12),
        unlabelled,
        soft,
        sizes=StepSizes(8, 8),
        steps=6,
        scale=SCALE,
        augmentation=AugmentConfig(max_intensity_shift=0.0),
        precision="fp32",
        seed=seed,
    )
    assert 0 < result.data_wait_s < 60
    return encoder, result.losses


def test_training_follows_its_seed_to_the_last_bit() -> None:
    first, losses = train(seed=5)
    again, losses_again = train(seed=5)
    other, _ = train(seed=6)
    assert losses == losses_again
    for one, two in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.head.weight, other.head.weight)


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
    nothing = embed(encoder, images[:0], scale=SCALE, batch_size=3, precision="fp32")
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


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_chosen_precision_stands(precision: str) -> None:
    assert resolve_precision(precision, torch.device("cpu")) == precision
    assert resolve_precision("auto", torch.device("cpu")) in {"bf16", "fp32"}
