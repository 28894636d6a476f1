"""Pretext losses: worked by hand, and the same with their gradients on one rank and on two."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainray import dist
from brainray.config import AugmentConfig
from brainray.dist import gather_equal_rows
from brainray.models.features import FeatureEncoder
from brainray.models.ntxent import ContrastivePretext, nt_xent
from brainray.models.pretext import NoPretext, PretextModel
from brainray.models.rotation import RotationPretext
from tests.ranks import OnRanks

STILL = AugmentConfig(
    policy="weak",
    horizontal_flip=0,
    rotation_probability=0,
    max_zoom=0,
    max_intensity_shift=0,
    max_shift=0,
)
NUM_SLICES, DIM, TEMPERATURE = 6, 5, 0.3
GROUPS = torch.tensor([0, 0, 1, 2, 1, 3])  # one of two slices on either rank
HALVES = (slice(0, 3), slice(3, 6))


def test_nt_xent_by_hand() -> None:
    # Views a, b of two slices: a1 = b1 = (1, 0), a2 = b2 = (0, 1). Each view's positive has
    # similarity 1, the two others 0, so each loses -log(e^(1/t) / (e^(1/t) + 2)).
    views = torch.eye(2)
    expected = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + 2))
    torch.testing.assert_close(nt_xent(views, views, *own_groups(2), 0.5), torch.tensor(expected))
    # The length of a projection does not matter.
    torch.testing.assert_close(
        nt_xent(3 * views, 0.1 * views, *own_groups(2), 0.5), torch.tensor(expected)
    )


def test_nt_xent_is_the_mean_over_views_of_equation_1() -> None:
    first, second = projections()
    z = F.normalize(torch.cat([first, second]))
    losses = []
    for i in range(len(z)):
        positive = (i + NUM_SLICES) % len(z)
        exponentials = [torch.exp(z[i] @ z[k] / TEMPERATURE) for k in range(len(z)) if k != i]
        losses.append(-torch.log(torch.exp(z[i] @ z[positive] / TEMPERATURE) / sum(exponentials)))
    torch.testing.assert_close(
        nt_xent(first, second, *own_groups(NUM_SLICES), TEMPERATURE), torch.stack(losses).mean()
    )


def test_the_gradient_of_nt_xent_is_that_of_equation_1() -> None:
    """A view learns as the one that is compared, and as one of those it is compared with."""
    first, second = (part.requires_grad_() for part in projections())
    (found,) = torch.autograd.grad(nt_xent(first, second, *own_groups(6), TEMPERATURE), first)
    z = F.normalize(torch.cat([first, second]))
    itself = torch.eye(len(z), dtype=torch.bool)
    similarity = (z @ z.T / TEMPERATURE).masked_fill(itself, -torch.inf)
    losses = similarity.logsumexp(dim=1) - similarity.diagonal(NUM_SLICES).repeat(2)
    (expected,) = torch.autograd.grad(losses.mean(), first)
    torch.testing.assert_close(found, expected)


def test_nt_xent_compares_in_full_precision() -> None:
    first, second = (part.bfloat16() for part in projections())
    groups = own_groups(NUM_SLICES)
    found = nt_xent(first, second, *groups, TEMPERATURE)
    assert torch.equal(found, nt_xent(first.float(), second.float(), *groups, TEMPERATURE))


def own_groups(count: int) -> tuple[Tensor, Tensor]:
    """Each slice is its own mate, and no other's."""
    return torch.arange(count), torch.arange(count)


def projections() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(NUM_SLICES, DIM, generator=generator)
    return first, first + 0.5 * torch.randn(NUM_SLICES, DIM, generator=generator)


def contrast_on_this_rank(weight: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's loss, and its gradient with respect to a shared weight (DIM, DIM)."""
    share = NUM_SLICES // dist.world_size()
    rows = slice(dist.rank() * share, (dist.rank() + 1) * share)
    first, second = (part[rows] for part in projections())
    weight = weight.clone().requires_grad_()
    groups = GROUPS[rows]
    loss = nt_xent(first @ weight, second @ weight, groups, groups, TEMPERATURE)
    loss.backward()
    assert weight.grad is not None
    return loss.detach(), weight.grad


def gather_on_this_rank() -> Tensor:
    """Gradient of this rank's rows where every rank sums row i of all, weighted by i + 1."""
    rows = torch.full((2, 1), 1.0, requires_grad=True)
    everyones = gather_equal_rows(rows)
    (everyones[:, 0] * torch.arange(1.0, len(everyones) + 1)).sum().backward()
    assert rows.grad is not None
    return rows.grad[:, 0]


def rotate_on_this_rank(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the rotation loss of a linear head (DIM, 4)."""
    share = NUM_SLICES // dist.world_size()
    rows = slice(dist.rank() * share, (dist.rank() + 1) * share)
    inputs, targets = projections()[0], torch.arange(NUM_SLICES) % 4
    weight = weight.clone().requires_grad_()
    loss = RotationPretext(STILL).loss(inputs[rows] @ weight, targets[rows])
    loss.backward()
    assert weight.grad is not None
    return loss.detach(), weight.grad


WEIGHTS = {
    "contrastive": torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)),
    "rotation": torch.randn(DIM, 4, generator=torch.Generator().manual_seed(2)),
}
LOSSES = {"contrastive": contrast_on_this_rank, "rotation": rotate_on_this_rank}


def everything_on_this_rank() -> dict[str, tuple[Tensor, Tensor]]:
    """Losses and gradients by pretext, and what a gathered row gets back."""
    results = {name: LOSSES[name](WEIGHTS[name]) for name in LOSSES}
    return results | {"gathered": (torch.zeros(()), gather_on_this_rank())}


@pytest.fixture(scope="module")
def ranks(on_two_ranks: OnRanks) -> list[dict[str, tuple[Tensor, Tensor]]]:
    return on_two_ranks(everything_on_this_rank)


@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_have_the_loss_and_the_gradient_of_one(
    name: str, ranks: list[dict[str, tuple[Tensor, Tensor]]]
) -> None:
    loss, gradient = LOSSES[name](WEIGHTS[name])
    # DDP averages the ranks' gradients.
    torch.testing.assert_close(torch.stack([r[name][0] for r in ranks]).mean(), loss)
    torch.testing.assert_close(torch.stack([r[name][1] for r in ranks]).mean(dim=0), gradient)


def test_candidates_of_the_other_rank_count() -> None:
    # The mean of two losses that each see half of the views is another loss.
    first, second = projections()
    halves = [nt_xent(first[rows], second[rows], *own_groups(3), TEMPERATURE) for rows in HALVES]
    assert not torch.allclose(
        torch.stack(halves).mean(), nt_xent(first, second, *own_groups(NUM_SLICES), TEMPERATURE)
    )


def test_a_gathered_row_gets_the_sum_of_all_ranks_gradients(
    ranks: list[dict[str, tuple[Tensor, Tensor]]],
) -> None:
    first, second = (rank["gathered"][1] for rank in ranks)
    assert first.tolist() == [2.0, 4.0]  # both ranks weigh rows 1 and 2
    assert second.tolist() == [6.0, 8.0]  # rows 3 and 4
    assert gather_on_this_rank().tolist() == [1.0, 2.0]


def test_rotation_asks_for_the_number_of_quarter_turns() -> None:
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    views = RotationPretext(STILL).views(images, own_groups(2)[0], torch.Generator().manual_seed(0))
    assert views.targets.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    upright = views.images[:2]
    torch.testing.assert_close(upright, images)
    for turns in range(4):
        seen = views.images[2 * turns : 2 * turns + 2]
        torch.testing.assert_close(seen, torch.rot90(upright, turns, dims=(2, 3)))


def test_the_rotation_loss_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    loss = RotationPretext(STILL).loss(logits, torch.tensor([0, 2]))
    expected = (-math.log(3 / 6) - math.log(1 / 4)) / 2
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_rotation_never_flips_upside_down() -> None:
    wild = AugmentConfig(policy="strong", vertical_flip=1.0, max_rotation_deg=180.0)
    images = torch.zeros(64, 1, 16, 16)
    images[:, :, :4] = 1.0  # the top is bright
    views = RotationPretext(wild).views(images, own_groups(64)[0], torch.Generator().manual_seed(0))
    upright = views.images[:64]
    assert (upright[:, 0, :8].mean(dim=(1, 2)) > upright[:, 0, 8:].mean(dim=(1, 2))).all()


def test_rotation_views_are_turned_no_further_than_is_set() -> None:
    config = STILL.model_copy(update={"rotation_probability": 1.0, "max_rotation_deg": 1e-3})
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    pretext = RotationPretext(config)
    views = pretext.views(images, own_groups(8)[0], torch.Generator().manual_seed(0))
    torch.testing.assert_close(views.images[:8], images, atol=1e-3, rtol=0)


def test_nt_xent_holds_no_slice_against_another_of_its_group() -> None:
    first, second = projections()
    z = F.normalize(torch.cat([first, second]))
    groups = GROUPS.repeat(2)
    losses = []
    for i in range(len(z)):
        positive = (i + NUM_SLICES) % len(z)
        others = [k for k in range(len(z)) if groups[k] != groups[i]]
        exponentials = [torch.exp(z[i] @ z[k] / TEMPERATURE) for k in [positive, *others]]
        losses.append(-torch.log(exponentials[0] / sum(exponentials)))
    found = nt_xent(first, second, GROUPS, GROUPS, TEMPERATURE)
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_contrastive_views_are_a_slice_and_its_mate() -> None:
    pretext = ContrastivePretext(STILL, TEMPERATURE, projection_dim=3)
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)).repeat(2, 1, 1, 1)
    groups = torch.tensor([4, 5, 6]).repeat(2)
    views = pretext.views(images, groups, torch.Generator().manual_seed(0))
    torch.testing.assert_close(views.images, images)
    outputs = pretext.head(4)(torch.randn(6, 4))
    assert outputs.shape == (6, 3)
    expected = nt_xent(outputs[:3], outputs[3:], groups[:3], groups[3:], TEMPERATURE)
    torch.testing.assert_close(pretext.loss(outputs, views.targets), expected)


def test_the_projection_is_not_linear() -> None:
    head = ContrastivePretext(STILL, TEMPERATURE, projection_dim=3).head(4)
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    middle = (head(features) + head(-features)) / 2
    assert not torch.allclose(middle, head(torch.zeros(5, 4)), atol=1e-3)


def test_clusters_see_normalised_features_and_the_head_those_of_the_encoder() -> None:
    model = PretextModel(FeatureEncoder(nn.Flatten()), nn.Linear(3 * 4 * 4, 2))
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    output = model(images)
    torch.testing.assert_close(output.z, F.normalize(model.encoder(images)))
    torch.testing.assert_close(output.outputs, model.head(model.encoder(images)))


def test_without_a_pretext_there_is_nothing_to_learn() -> None:
    outputs = torch.randn(4, 2, requires_grad=True)
    pretext = NoPretext(STILL)
    loss = pretext.loss(outputs, torch.zeros(4))
    loss.backward()
    assert loss.item() == 0
    assert outputs.grad is not None
    assert not outputs.grad.any()
    assert isinstance(pretext.head(2), nn.Identity)
