"""Learning without labels on one rank: what is learned, when it ends, what no label touches."""

import pytest
import torch
from torch import Tensor

from brainray import dist
from brainray.config import (
    AugmentConfig,
    ClusteringConfig,
    PretextName,
    SelfSupervisionConfig,
    TrainConfig,
)
from brainray.engine.loop import train_epoch
from brainray.engine.recipe import build_optimizer
from brainray.engine.recluster import recluster
from brainray.engine.self_supervised import (
    Groups,
    PretextBatch,
    PretextEpoch,
    PretextSlices,
    SoftTargets,
    StepPlan,
    build_pretext,
    changed_share,
    check_contrast,
    embed_slices,
    is_refined,
    plan_steps,
)
from brainray.engine.shard import CachedImages
from brainray.errors import ConfigError, DataError
from brainray.models.features import FeatureEncoder
from brainray.models.ntxent import ContrastivePretext
from brainray.models.pretext import NoPretext, PretextModel, PretextOutput
from brainray.models.rotation import RotationPretext
from brainray.schema import UNLABELLED
from tests.ranks import OnRanks

SIDE, NUM_IMAGES = 16, 48
SETTINGS = SelfSupervisionConfig(
    projection_dim=8, augment=AugmentConfig(policy="weak", max_rotation_deg=5.0)
)


def striped_images() -> Tensor:
    """(N, 1, side, side) uint8: bright above, in one of three widths, so that turns can be told."""
    images = torch.zeros(NUM_IMAGES, 1, SIDE, SIDE, dtype=torch.uint8)
    for number in range(NUM_IMAGES):
        images[number, 0, : 2 + 2 * (number % 3)] = 150 + number
    return images


def striped_slices(num_groups: int = NUM_IMAGES) -> PretextSlices:
    keys = torch.arange(NUM_IMAGES)
    return PretextSlices(CachedImages(striped_images()), keys, Groups(keys % num_groups))


def small_model(pretext_name: PretextName) -> PretextModel:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, stride=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 6 * 6, 16),
    )
    return PretextModel(FeatureEncoder(network), build_pretext(pretext_name, SETTINGS).head(16))


def train(
    pretext_name: PretextName, num_epochs: int, seed: int = 0
) -> tuple[PretextModel, list[float]]:
    model = small_model(pretext_name)
    plan = plan_steps(NUM_IMAGES, 16, num_ranks=1)
    config = TrainConfig(learning_rate=5e-3)
    optimizer, scheduler = build_optimizer(model, config, num_epochs * plan.num_steps)
    losses = [
        train_epoch(
            model,
            optimizer,
            scheduler,
            PretextEpoch(
                striped_slices(),
                build_pretext(pretext_name, SETTINGS),
                plan,
                seed=100 * seed + epoch,
            ),
            precision="fp32",
        ).losses["total"]
        for epoch in range(num_epochs)
    ]
    return model, losses


def test_dropout_follows_from_the_seed_whatever_came_before() -> None:
    """An epoch in a new process, after a kill, is that of a process that went on."""
    weights = []
    for drawn_before in (0, 7):
        model = small_model("rotation")
        model.encoder = FeatureEncoder(
            torch.nn.Sequential(model.encoder.backbone, torch.nn.Dropout(0.5))
        )
        torch.rand(drawn_before)
        train_epoch(
            model,
            *build_optimizer(model, TrainConfig(), 3),
            PretextEpoch(
                striped_slices(),
                build_pretext("rotation", SETTINGS),
                plan_steps(NUM_IMAGES, 16, num_ranks=1),
                seed=5,
            ),
            precision="fp32",
        )
        weights.append(torch.cat([part.flatten() for part in model.parameters()]).detach())
    assert torch.equal(*weights)


def test_a_mate_is_the_slice_itself_or_another_of_its_group() -> None:
    numbers = torch.tensor([7, 3, 7, 9, 3, 7])
    groups = Groups(numbers)
    rows = torch.arange(6).repeat(500)
    mates = groups.mates(rows, torch.Generator().manual_seed(0))
    assert torch.equal(numbers[mates], numbers[rows])
    for row, size in ((0, 3), (1, 2), (3, 1)):
        drawn = mates[rows == row]
        assert set(drawn.tolist()) == set(torch.nonzero(numbers == numbers[row])[:, 0].tolist())
        # Half of the time itself, and by chance in the other half.
        share = (drawn == row).float().mean().item()
        assert share == pytest.approx(0.5 + 0.5 / size, abs=0.06)


@pytest.mark.parametrize("name", ["rotation", "contrastive"])
def test_a_pretext_is_learned(name: PretextName) -> None:
    _, losses = train(name, num_epochs=12)
    assert losses[-1] < 0.75 * losses[0]  # slices of one width cannot be told apart


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = (train("contrastive", 2)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train("contrastive", 2, seed=1)[0].state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_clustering_loss_draws_slices_to_their_centres() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (NUM_IMAGES, 1, SIDE, SIDE), generator=generator)
    images, keys = CachedImages(pixels.to(torch.uint8)), torch.arange(NUM_IMAGES)
    model = small_model("none")
    clustering = ClusteringConfig(num_clusters=3, pca_dim=3, covariance_type="diag")
    z = embed_slices(model.encoder, images, batch_size=32, precision="fp32").clone()
    none = torch.full_like(keys, UNLABELLED)
    found = recluster(z, keys, none, config=clustering, num_classes=0, seed=0)
    plan = plan_steps(NUM_IMAGES, 16, num_ranks=1)
    optimizer, scheduler = build_optimizer(model, TrainConfig(), 10 * plan.num_steps)
    history = [
        train_epoch(
            model,
            optimizer,
            scheduler,
            PretextEpoch(
                PretextSlices(images, keys, Groups(keys)),
                build_pretext("none", SETTINGS),
                plan,
                seed=epoch,
                lambda_cluster=0.5,
                soft=SoftTargets(found.responsibilities, found.model.centers),
            ),
            precision="fp32",
        ).losses
        for epoch in range(10)
    ]
    assert all(terms["total"] == pytest.approx(0.5 * terms["cluster"]) for terms in history)
    assert history[-1]["cluster"] < 0.8 * history[0]["cluster"]


@pytest.mark.parametrize("name", ["rotation", "contrastive", "none"])
def test_own_views_come_first_and_have_the_targets_of_their_slices(name: PretextName) -> None:
    epoch = PretextEpoch(
        striped_slices(num_groups=16),
        build_pretext(name, SETTINGS),
        plan_steps(NUM_IMAGES, 16, num_ranks=1),
        seed=1,
        soft=SoftTargets(torch.eye(NUM_IMAGES), torch.zeros(NUM_IMAGES, 8)),
    )
    for batch in epoch.batches():
        assert batch.soft is not None
        slices = batch.soft.responsibilities.argmax(dim=1)
        assert torch.equal(batch.keys[: len(slices)], slices)


def test_turned_views_are_drawn_to_no_centre() -> None:
    z = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    batch = PretextBatch(
        images=torch.zeros(8, 1, SIDE, SIDE),
        keys=torch.arange(2).repeat(4),
        pretext=build_pretext("rotation", SETTINGS),
        targets=torch.arange(4).repeat_interleave(2),
        lambda_cluster=1.0,
        soft=SoftTargets(torch.eye(2), centers=z[:2]),  # of the two upright views
    )
    losses = batch.loss(PretextOutput(z, torch.zeros(8, 4)))
    assert losses["cluster"].item() == pytest.approx(0, abs=1e-6)


def test_slices_come_in_an_order_of_the_seed_with_their_own_groups() -> None:
    slices = striped_slices(num_groups=10)
    orders = []
    for seed in (1, 2):
        epoch = PretextEpoch(
            slices,
            build_pretext("none", SETTINGS),  # its targets are the groups
            plan_steps(NUM_IMAGES, 16, num_ranks=1),
            seed=seed,
        )
        batches = list(epoch.batches())
        orders.append(torch.cat([batch.keys for batch in batches]))
        targets = torch.cat([batch.targets for batch in batches])
        assert torch.equal(targets, slices.groups.numbers[orders[-1]])
        assert torch.equal(orders[-1].sort().values, slices.keys)
    assert not torch.equal(*orders)


def test_views_are_of_their_slices_in_units_of_one() -> None:
    config = SelfSupervisionConfig(augment=AugmentConfig(policy="none"))
    plan = plan_steps(NUM_IMAGES, 16, num_ranks=1)
    epoch = PretextEpoch(striped_slices(), build_pretext("none", config), plan, seed=1)
    for batch in epoch.batches():
        torch.testing.assert_close(batch.images, striped_images()[batch.keys] / 255)


def test_slices_are_embedded_as_they_are_trained_on() -> None:
    images = striped_images()
    encoder = FeatureEncoder(torch.nn.Flatten(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    found = embed_slices(encoder, CachedImages(images), batch_size=7, precision="fp32")
    torch.testing.assert_close(found, torch.nn.functional.normalize(encoder(images / 255)))


def test_a_pretext_has_the_settings_that_are_configured() -> None:
    config = SelfSupervisionConfig(
        augment=AugmentConfig(policy="weak"), temperature=0.07, projection_dim=5
    )
    expected = ContrastivePretext(config.augment, temperature=0.07, projection_dim=5)
    assert build_pretext("contrastive", config) == expected
    assert build_pretext("rotation", config) == RotationPretext(config.augment)
    assert build_pretext("none", config) == NoPretext(config.augment)


def test_an_epoch_is_one_pass_in_equal_steps() -> None:
    assert plan_steps(100, 16, num_ranks=2) == plan_steps(101, 16, num_ranks=2)
    plan = plan_steps(101, 16, num_ranks=2)
    assert (plan.num_steps, plan.batch_size) == (3, 16)
    assert plan_steps(4850, 256, num_ranks=8) == StepPlan(3, 202)  # of 606 each
    assert plan_steps(255, 128, num_ranks=1) == StepPlan(2, 127)
    assert plan_steps(3, 2, num_ranks=1) == StepPlan(1, 2)  # a slice alone has no contrast
    tiny = plan_steps(5, 16, num_ranks=2)
    assert (tiny.num_steps, tiny.batch_size) == (1, 2)


def test_a_contrast_needs_two_slices_per_step_and_two_groups() -> None:
    config = SelfSupervisionConfig()
    check_contrast(plan_steps(2, 64, num_ranks=1), 2, config)
    with pytest.raises(ConfigError, match=r"raise self_supervision\.batch_size_per_worker \(128\)"):
        check_contrast(plan_steps(1, 64, num_ranks=1), 1, config)
    with pytest.raises(DataError, match=r"set self_supervision\.positives=slice"):
        check_contrast(plan_steps(9, 64, num_ranks=1), 1, config)


def test_a_slice_on_each_of_two_ranks_is_a_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    check_contrast(plan_steps(2, 64, num_ranks=2), 2, SelfSupervisionConfig())


def test_refinement_ends_when_calm_for_as_long_as_asked_or_at_the_limit() -> None:
    config = SelfSupervisionConfig(tolerance=0.05, patience=2, max_rounds=5)
    assert not is_refined([], config)
    assert not is_refined([0.01], config)
    assert not is_refined([0.04, 0.2, 0.01], config)
    assert is_refined([0.3, 0.05, 0.01], config)
    assert is_refined([0.5] * 5, config)


def share_changed_on_this_rank() -> float:
    of_this_rank = slice(dist.rank(), None, dist.world_size())
    before = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
    after = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.6, 0.4], [1.0, 0.0]])
    return changed_share(before[of_this_rank], after[of_this_rank])


def test_changed_assignments_are_counted_on_all_ranks(on_two_ranks: OnRanks) -> None:
    assert share_changed_on_this_rank() == 0.25
    assert on_two_ranks(share_changed_on_this_rank) == [0.25, 0.25]
