"""Pseudo-labels: trusted where the encoder is surer than usual, in the labelled slices' shares."""

import math

import pytest
import torch
from torch import Tensor

from brainray import dist
from brainray.engine.pseudo_labels import (
    PseudoLabels,
    balance_assignments,
    class_shares,
    class_shift,
    pseudo_labels,
)
from brainray.engine.recipe import ramp
from brainray.schema import UNLABELLED
from tests.ranks import OnRanks

SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def test_the_class_shift_is_the_share_that_is_elsewhere() -> None:
    sure = torch.eye(3)[[0, 0, 0, 1]]
    assert class_shift(sure, torch.tensor([0.75, 0.25, 0.0])) == pytest.approx(0.0)
    assert class_shift(sure, torch.tensor([0.25, 0.25, 0.5])) == pytest.approx(0.5)


def probabilities(num: int = 4000) -> Tensor:
    """(num, 3), biased towards the last class."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num, 3, generator=generator, dtype=torch.float64)
    return (2 * logits + torch.tensor([0.0, 0.0, 1.0])).softmax(dim=1)


def test_balanced_rows_sum_to_one_and_columns_have_their_shares() -> None:
    balanced = balance_assignments(probabilities(), SHARES)
    torch.testing.assert_close(balanced.sum(dim=1), torch.ones(4000, dtype=torch.float64))
    torch.testing.assert_close(balanced.mean(dim=0), SHARES, atol=0.01, rtol=0)
    assert probabilities().mean(dim=0)[2] > 0.4  # they were far from it


def test_what_is_balanced_already_stays_as_it_is() -> None:
    even = torch.tensor([[0.8, 0.2], [0.2, 0.8]], dtype=torch.float64)
    halves = torch.tensor([0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(balance_assignments(even, halves), even)


def test_weights_fall_off_below_the_mean_confidence() -> None:
    # Confidences 0.9, 0.9, 0.6, 0.6: mean 0.75, variance 0.0225, and sigma is halved.
    rows = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]], dtype=torch.float64)
    found = pseudo_labels(rows, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert found.labels.tolist() == [0, 1, 0, 1]
    low = math.exp(-(0.15**2) / (2 * 0.0225 / 4))
    torch.testing.assert_close(found.confidences, torch.tensor([1.0, 1.0, low, low]))


def test_labels_are_those_of_the_balanced_probabilities() -> None:
    both_last = torch.tensor([[0.45, 0.55], [0.05, 0.95]], dtype=torch.float64)
    found = pseudo_labels(both_last, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert found.labels.tolist() == [0, 1]


def test_known_labels_are_certain_and_the_others_stay() -> None:
    found = PseudoLabels(torch.tensor([0, 1, 1]), torch.tensor([0.5, 0.25, 0.75]))
    overridden = found.overridden_by(torch.tensor([2, UNLABELLED, 1]))
    assert overridden.labels.tolist() == [2, 1, 1]
    assert overridden.confidences.tolist() == [1.0, 0.25, 1.0]


def test_a_slice_of_no_labelled_class_is_not_believed() -> None:
    rows = torch.tensor([[1.0, 0, 0], [0.2, 0.5, 0.3]], dtype=torch.float64)
    found = pseudo_labels(rows, torch.tensor([0, 0.5, 0.5], dtype=torch.float64))
    assert torch.isfinite(found.confidences).all()


def of_this_rank() -> tuple[Tensor, Tensor]:
    found = pseudo_labels(probabilities()[dist.rank() :: dist.world_size()], SHARES)
    return found.labels, found.confidences


def test_two_ranks_trust_the_slices_that_one_trusts(on_two_ranks: OnRanks) -> None:
    labels, confidences = of_this_rank()
    for rank, (labels_of_rank, confidences_of_rank) in enumerate(on_two_ranks(of_this_rank)):
        assert torch.equal(labels_of_rank, labels[rank::2])
        torch.testing.assert_close(confidences_of_rank, confidences[rank::2])


def shares_and_shift_of_this_rank() -> tuple[list[float], float]:
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 0, 1])[dist.rank() :: dist.world_size()]
    shift = class_shift(torch.eye(3)[labels], torch.tensor([0.2, 0.3, 0.5]))
    return class_shares(labels, 3).tolist(), shift


def test_shares_of_classes_are_of_the_slices_of_all_ranks(on_two_ranks: OnRanks) -> None:
    work = shares_and_shift_of_this_rank
    for shares, shift in [work(), *on_two_ranks(work)]:
        assert shares == [0.5, 0.25, 0.25]
        assert shift == pytest.approx(0.3)


def test_a_rank_without_rows_has_no_pseudo_labels() -> None:
    found = pseudo_labels(torch.empty(0, 3), SHARES)
    assert len(found.labels) == len(found.confidences) == 0


def test_the_ramp_rises_to_one_in_its_epochs() -> None:
    assert math.isclose(ramp(1, 5), math.exp(-5))
    assert ramp(6, 5) == ramp(100, 5) == 1.0
    assert [ramp(epoch, 5) for epoch in range(1, 7)] == sorted(ramp(e, 5) for e in range(1, 7))
    assert ramp(1, 0) == 1.0
