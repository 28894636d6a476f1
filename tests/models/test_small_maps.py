import pytest
import torch
import torchvision
from torch import nn

from brainray.models.encoder import Encoder
from brainray.models.small_maps import SmallMapConv2d, with_fast_small_maps


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (7, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_a_convolution(
    side: int, stride: int, bias: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 512, 3, stride=stride, padding=1, bias=bias)).double()
    fast = with_fast_small_maps(nn.Sequential(nn.Conv2d(4, 512, 3, stride, 1, bias=bias))).double()
    assert isinstance(fast[0], SmallMapConv2d)
    fast.load_state_dict(plain.state_dict())
    images = torch.randn(3, 4, side, side + 1, dtype=torch.float64)
    results = []
    for layer in (plain, fast):
        given = images.clone().requires_grad_()
        out = layer(given)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        results.append([out, given.grad, *(p.grad for p in layer.parameters())])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_memory_format_is_kept() -> None:
    layer = with_fast_small_maps(nn.Sequential(nn.Conv2d(8, 512, 3, padding=1)))
    images = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    assert layer(images).is_contiguous(memory_format=torch.channels_last)


def test_weights_and_random_numbers_are_left_as_they_were() -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    before = dict(network.named_parameters())
    drawn = torch.get_rng_state()
    with_fast_small_maps(network)
    after = dict(network.named_parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_only_the_last_stage_of_the_encoder_is_computed_so() -> None:
    names = [
        name
        for name, module in Encoder("resnet18", 4).named_modules()
        if isinstance(module, SmallMapConv2d)
    ]
    assert names == [
        f"backbone.layer4.{block}.conv{number}" for block in range(2) for number in (1, 2)
    ]


def test_other_convolutions_are_left_alone() -> None:
    layers = [
        nn.Conv2d(4, 512, 1),
        nn.Conv2d(4, 512, 3),
        nn.Conv2d(4, 256, 3, padding=1),
        nn.Conv2d(4, 512, 3, padding=2, dilation=2),
        nn.Conv2d(512, 512, 3, padding=1, groups=512),
        nn.Conv2d(4, 512, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 512, 3, stride=(1, 2), padding=1),
    ]
    network = with_fast_small_maps(nn.Sequential(*layers))
    assert all(type(layer) is nn.Conv2d for layer in network)


def test_exported_models_hold_convolutions() -> None:
    layer = with_fast_small_maps(nn.Sequential(nn.Conv2d(8, 512, 3, padding=1))).eval()
    program = torch.export.export(layer, (torch.zeros(2, 8, 4, 4),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert len(called) == 1
    assert "conv2d" in called.pop()
