"""Mixtures of labelled slices, and the loss that goes with them."""

import torch

from brainray.models.encoder import EncoderOutput
from brainray.models.mixup import Mixup
from brainray.models.objective import Objective, StepOutputs
from tests.engine.targets import uninformed

CPU = torch.device("cpu")


def test_slices_and_losses_are_mixed_in_the_same_shares() -> None:
    mixup = Mixup(share=0.75, partners=torch.tensor([1, 0, 2]))
    images = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1, 1)
    torch.testing.assert_close(mixup.images(images).flatten(), torch.tensor([0.25, 0.75, 0.5]))
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    z = torch.zeros(3, 8)
    nothing = EncoderOutput(z[:0], logits[:0])
    found = mixup.loss(
        Objective(),
        StepOutputs(EncoderOutput(z, logits), nothing),
        torch.tensor([0, 3, 1]),
        uninformed(0, 8),
    )
    soft = torch.tensor([[0.75, 0, 0, 0.25], [0.25, 0, 0, 0.75], [0, 1, 0, 0]])
    expected = torch.nn.functional.cross_entropy(logits, soft)
    torch.testing.assert_close(found["total"], expected)


def test_draws_follow_the_seed_and_favour_the_slice_itself() -> None:
    drawn = [Mixup.draw(16, 0.4, seed, CPU) for seed in range(200)]
    again = Mixup.draw(16, 0.4, 3, CPU)
    assert again.share == drawn[3].share
    assert torch.equal(again.partners, drawn[3].partners)
    assert all(0.5 <= mixup.share <= 1 for mixup in drawn)
    assert len({mixup.share for mixup in drawn}) == 200
    assert sorted(again.partners.tolist()) == list(range(16))


def test_partners_are_others_in_every_step() -> None:
    first, second = (Mixup.draw(16, 0.4, seed, CPU).partners for seed in (3, 4))
    assert not torch.equal(first, second)


def test_the_smaller_alpha_the_less_is_mixed() -> None:
    shares = {
        alpha: [Mixup.draw(1, alpha, seed, CPU).share for seed in range(200)]
        for alpha in (0.1, 10.0)
    }
    assert sum(shares[0.1]) / 200 > 0.9
    assert sum(shares[10.0]) / 200 < 0.65
