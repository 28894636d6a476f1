"""The joint loss and its gradient: worked by hand, and the same on one rank and on two."""

import math

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from brainray import dist
from brainray.dist import run_on_ranks
from brainray.models.encoder import Encoder
from brainray.models.joint import JointObjective, cluster_loss
from brainray.models.objective import StepTargets
from brainray.models.supervised import SupervisedObjective

Z = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
GAMMA = torch.tensor([[0.75, 0.25], [0.0, 1.0]])
CENTERS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
LOGITS = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
TARGETS = StepTargets(labels=torch.tensor([0, 1]), responsibilities=GAMMA, centers=CENTERS)


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
    terms = JointObjective(lambda_cluster=0.5).loss(LOGITS, Z, TARGETS)
    cross_entropy = (-math.log(0.75) - math.log(0.5)) / 2
    assert math.isclose(float(terms["ce"]), cross_entropy, rel_tol=1e-6)
    assert math.isclose(float(terms["cluster"]), 0.45, rel_tol=1e-6)
    assert math.isclose(float(terms["total"]), cross_entropy + 0.5 * 0.45, rel_tol=1e-6)


def test_the_control_is_cross_entropy_alone_with_as_many_images() -> None:
    control = SupervisedObjective()
    terms = control.loss(LOGITS, Z[:0], TARGETS)
    assert set(terms) == {"total", "ce"}
    torch.testing.assert_close(terms["total"], -(torch.tensor([0.75, 0.5]).log().mean()))
    assert sum(control.step_sizes(32, 64)) == sum(JointObjective(1.0).step_sizes(32, 64))
    assert control.step_sizes(32, 64).unlabelled == 0


def joint_step(model: nn.Module, images: Tensor, rows: slice) -> dict[str, Tensor]:
    """Loss of the given rows, with labels, gamma and centres that follow from the row number."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(8) % 3
    gamma = torch.rand(8, 4, generator=generator).softmax(dim=1)
    centers = nn.functional.normalize(torch.randn(4, 512, generator=generator))
    output = model(torch.cat([images[rows], images[rows].flip(-1)]))
    half = len(images[rows])
    targets = StepTargets(labels[rows], gamma[rows], centers)
    return JointObjective(0.5).loss(output.logits[:half], output.z[half:], targets)


def gradients_of_joint_step() -> tuple[float, Tensor, Tensor]:
    """The global batch's loss, and its gradient for the head and the first convolution."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", num_classes=3).eval()
    images = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    model = DistributedDataParallel(encoder) if dist.world_size() > 1 else encoder
    mine = slice(dist.rank() * 8 // dist.world_size(), (dist.rank() + 1) * 8 // dist.world_size())
    terms = joint_step(model, images, mine)
    terms["total"].backward()
    total = dist.sum_across_ranks(terms["total"].detach()) / dist.world_size()
    head, stem = encoder.head.weight.grad, encoder.backbone.conv1.weight.grad
    assert isinstance(head, Tensor)
    assert isinstance(stem, Tensor)
    return float(total), head, stem


def test_two_ranks_give_the_loss_and_gradient_of_one() -> None:
    loss, head, stem = gradients_of_joint_step()
    for loss_of_rank, head_of_rank, stem_of_rank in run_on_ranks(gradients_of_joint_step, 2):
        assert math.isclose(loss_of_rank, loss, rel_tol=1e-5)
        torch.testing.assert_close(head_of_rank, head, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stem_of_rank, stem, rtol=1e-3, atol=1e-6)
