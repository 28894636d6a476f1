"""Every loss and its gradient: worked by hand, and the same on one rank and on two."""

import math
from contextlib import nullcontext
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from brainray import dist
from brainray.config import ObjectiveConfig
from brainray.config_text import load_config
from brainray.engine.recipe import build_objective
from brainray.errors import ConfigError
from brainray.models.consistency import Consistency
from brainray.models.encoder import Encoder, EncoderOutput
from brainray.models.objective import Objective, StepOutputs, Targets
from brainray.models.prototype import Prototype, anchor_loss
from brainray.models.soft_kmeans import SoftKMeans, cluster_loss
from tests.ranks import OnRanks

Z = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
GAMMA = torch.tensor([[0.75, 0.25], [0.0, 1.0]])
CENTERS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
LOGITS = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
LABELS = torch.tensor([0, 1])
TARGETS = Targets(
    responsibilities=GAMMA,
    pseudo_labels=torch.tensor([1, 0]),
    confidences=torch.tensor([1.0, 0.5]),
    centers=CENTERS,
    class_of_cluster=torch.tensor([0, 1]),
    ramp=0.5,
)
LABELLED = EncoderOutput(z=Z, logits=LOGITS)
OUTPUTS = StepOutputs(labelled=LABELLED, unlabelled=EncoderOutput(z=Z, logits=LOGITS))
CROSS_ENTROPY = (-math.log(0.75) - math.log(0.5)) / 2


def test_the_cluster_loss_by_hand() -> None:
    # Row 1: 0.75 * 0 + 0.25 * |(1,0)-(0,1)|^2 = 0.25 * 2; row 2: |(0.6,0.8)-(0,1)|^2 = 0.4.
    torch.testing.assert_close(cluster_loss(Z, GAMMA, CENTERS), torch.tensor((0.5 + 0.4) / 2))


def test_the_gradient_of_the_cluster_loss_by_hand() -> None:
    # d/dz_i = (2/N) sum_k gamma_ik (z_i - mu_k), and nothing reaches gamma or mu.
    z, gamma, centers = (tensor.clone().requires_grad_() for tensor in (Z, GAMMA, CENTERS))
    cluster_loss(z, gamma, centers).backward()
    expected = torch.stack([Z[0] - GAMMA[0] @ CENTERS, Z[1] - GAMMA[1] @ CENTERS])
    torch.testing.assert_close(z.grad, expected)
    assert gamma.grad is None
    assert centers.grad is None


def test_the_joint_loss_is_cross_entropy_plus_lambda_times_cluster() -> None:
    terms = Objective((SoftKMeans(0.5),)).loss(OUTPUTS, LABELS, TARGETS)
    assert math.isclose(float(terms["ce"]), CROSS_ENTROPY, rel_tol=1e-6)
    assert math.isclose(float(terms["cluster"]), 0.45, rel_tol=1e-6)
    assert math.isclose(float(terms["total"]), CROSS_ENTROPY + 0.5 * 0.45, rel_tol=1e-6)


def test_the_gradient_of_the_joint_loss_for_the_head_by_hand() -> None:
    # dL/dW = (p - y)^T z / N, with p = (3/4, 1/4) and (1/2, 1/2), all from labelled slices.
    head = nn.Linear(2, 2)
    head.weight.data = math.log(3.0) * torch.tensor([[1.0, -0.75], [0.0, 0.0]])
    head.bias.data.zero_()
    outputs = StepOutputs(*(EncoderOutput(Z, head(Z)) for _ in range(2)))
    Objective((SoftKMeans(0.5),)).loss(outputs, LABELS, TARGETS)["total"].backward()
    torch.testing.assert_close(head.weight.grad, torch.tensor([[0.025, 0.2], [-0.025, -0.2]]))
    torch.testing.assert_close(head.bias.grad, torch.tensor([0.125, -0.125]))


@pytest.mark.parametrize("name", get_args(ObjectiveConfig.model_fields["name"].annotation))
def test_an_objective_learns_pseudo_labels_if_its_loss_depends_on_them(name: str) -> None:
    """What the config says of it, and assumes when labels are to be inherited."""
    config = ObjectiveConfig.model_validate({"name": name})
    objective = build_objective(config)
    other = TARGETS._replace(pseudo_labels=1 - TARGETS.pseudo_labels)
    losses = [objective.loss(OUTPUTS, LABELS, targets)["total"] for targets in (TARGETS, other)]
    assert config.learns_pseudo_labels == (losses[0] != losses[1])
    is_refused = objective.uses_unlabelled and not config.learns_pseudo_labels
    with pytest.raises(ConfigError, match="pseudo-labels") if is_refused else nullcontext():
        load_config(None, [f"objective.name={name}", "objective.inherit_labels=subject"])


def test_consistency_weighs_the_cross_entropy_of_pseudo_labels_by_confidence() -> None:
    # p = (3/4, 1/4) and (1/2, 1/2), pseudo-labels 1 and 0 with weights 1 and 1/2.
    consistency = (-math.log(0.25) - 0.5 * math.log(0.5)) / 2
    terms = Objective((Consistency(2.0),)).loss(OUTPUTS, LABELS, TARGETS)
    assert math.isclose(float(terms["consistency"]), consistency, rel_tol=1e-6)
    assert math.isclose(
        float(terms["total"]), CROSS_ENTROPY + 0.5 * 2.0 * consistency, rel_tol=1e-6
    )


def test_the_prototype_terms_by_hand() -> None:
    # Cosines to the prototypes are z itself, for only the directions of centres count: here (1,0)
    # and (0,1). At temperature 1/2 they are doubled.
    targets = TARGETS._replace(centers=torch.tensor([[3.0, 0.0], [0.0, 0.1]]))
    first = math.log1p(math.exp(-2.0)), math.log1p(math.exp(2.0))  # -log p of row 1
    second = math.log1p(math.exp(0.4)), math.log1p(math.exp(-0.4))
    prototype = (0.75 * first[0] + 0.25 * first[1] + 0.5 * second[1]) / 2
    anchor = (first[0] + second[1]) / 2
    terms = Objective((Prototype(0.1, temperature=0.5),)).loss(OUTPUTS, LABELS, targets)
    assert math.isclose(float(terms["cluster"]), prototype, rel_tol=1e-6)
    assert math.isclose(float(terms["anchor"]), anchor, rel_tol=1e-6)
    total = CROSS_ENTROPY + 0.1 * (0.5 * prototype + anchor)
    assert math.isclose(float(terms["total"]), total, rel_tol=1e-6)


def test_any_cluster_of_its_class_will_do_for_a_labelled_slice() -> None:
    log_near = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]).log()
    class_of_cluster = torch.tensor([0, 1, 0])
    loss = anchor_loss(log_near, torch.tensor([0, 2]), class_of_cluster)
    # Clusters 0 and 2 are the first slice's; no cluster stands for the second's class.
    assert math.isclose(float(loss), -math.log(0.5) / 2, rel_tol=1e-6)


def test_nothing_is_learnt_from_targets() -> None:
    centers = CENTERS.clone().requires_grad_()
    z = Z.clone().requires_grad_()
    outputs = OUTPUTS._replace(unlabelled=EncoderOutput(z, LOGITS))
    objective = Objective((Prototype(0.1, temperature=0.5),))
    objective.loss(outputs, LABELS, TARGETS._replace(centers=centers))["total"].backward()
    assert z.grad is not None
    assert centers.grad is None


def test_the_anchored_objective_adds_both_with_one_cross_entropy() -> None:
    consistency, prototype = Consistency(2.0), Prototype(0.1, temperature=0.5)
    both = Objective((consistency, prototype)).loss(OUTPUTS, LABELS, TARGETS)
    expected = (
        CROSS_ENTROPY
        + consistency(OUTPUTS, LABELS, TARGETS)[0]
        + prototype(OUTPUTS, LABELS, TARGETS)[0]
    )
    torch.testing.assert_close(both["total"], expected)
    assert set(both) == {"total", "ce", "consistency", "cluster", "anchor"}


def test_the_control_is_cross_entropy_alone() -> None:
    control = Objective()
    empty = EncoderOutput(Z[:0], LOGITS[:0])
    terms = control.loss(OUTPUTS._replace(unlabelled=empty), LABELS, TARGETS)
    assert set(terms) == {"total", "ce"}
    torch.testing.assert_close(terms["total"], -(torch.tensor([0.75, 0.5]).log().mean()))


def test_without_unlabelled_slices_only_terms_of_labelled_ones_are_left() -> None:
    none = EncoderOutput(Z[:0], LOGITS[:0])
    outputs = OUTPUTS._replace(unlabelled=none)
    targets = TARGETS.of_rows(torch.empty(0, dtype=torch.int64))
    consistency, prototype = Consistency(2.0), Prototype(0.1, temperature=0.5)
    for term in (SoftKMeans(1.0), consistency):
        assert term(outputs, LABELS, targets)[0] == 0
    losses = Objective((consistency, prototype)).loss(outputs, LABELS, targets)
    torch.testing.assert_close(losses["total"], CROSS_ENTROPY + 0.1 * losses["anchor"])
    assert losses["anchor"] > 0


def step(objective: Objective, model: nn.Module, images: Tensor, rows: slice) -> dict[str, Tensor]:
    """Loss of the given rows, with labels, gamma and centres that follow from the row number."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(8) % 3
    gamma = torch.rand(8, 4, generator=generator).softmax(dim=1)
    centers = nn.functional.normalize(torch.randn(4, 512, generator=generator))
    output = model(torch.cat([images[rows], images[rows].flip(-1)]))
    half = len(images[rows])
    targets = Targets(
        responsibilities=gamma[rows],
        pseudo_labels=(labels[rows] + 1) % 3,
        confidences=gamma[rows, 0],
        centers=centers,
        class_of_cluster=torch.tensor([0, 1, 2, 0]),
        ramp=0.7,
    )
    outputs = StepOutputs(
        EncoderOutput(output.z[:half], output.logits[:half]),
        EncoderOutput(output.z[half:], output.logits[half:]),
    )
    return objective.loss(outputs, labels[rows], targets)


def gradients_of_step(objective: Objective) -> tuple[float, Tensor, Tensor]:
    """The global batch's loss, and its gradient for the head and the first convolution."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", num_classes=3).eval()
    images = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    model = DistributedDataParallel(encoder) if dist.world_size() > 1 else encoder
    mine = slice(dist.rank() * 8 // dist.world_size(), (dist.rank() + 1) * 8 // dist.world_size())
    terms = step(objective, model, images, mine)
    terms["total"].backward()
    total = dist.sum_across_ranks(terms["total"].detach()) / dist.world_size()
    head, stem = encoder.head.weight.grad, encoder.backbone.conv1.weight.grad
    assert isinstance(head, Tensor)
    assert isinstance(stem, Tensor)
    return float(total), head, stem


def gradients_of_all() -> list[tuple[float, Tensor, Tensor]]:
    consistency, prototype = Consistency(1.0), Prototype(0.5, temperature=0.1)
    objectives = (Objective((SoftKMeans(0.5),)), Objective((consistency, prototype)))
    return [gradients_of_step(objective) for objective in objectives]


def test_two_ranks_give_the_loss_and_gradient_of_one(on_two_ranks: OnRanks) -> None:
    expected = gradients_of_all()
    found = on_two_ranks(gradients_of_all)
    for (loss, head, stem), *rank_results in zip(expected, *found, strict=True):
        for loss_of_rank, head_of_rank, stem_of_rank in rank_results:
            assert math.isclose(loss_of_rank, loss, rel_tol=1e-5)
            torch.testing.assert_close(head_of_rank, head, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(stem_of_rank, stem, rtol=1e-3, atol=1e-6)
