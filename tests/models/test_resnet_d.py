"""ResNet-D, as timm has it."""

import pytest
import torch
from torch import nn

from brainray.errors import ConfigError
from brainray.models.encoder import build_encoder, imagenet_state
from brainray.models.features import build_feature_encoder
from brainray.models.resnet_d import RESNETS_D, build_network

IMAGES = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "num_parameters"),  # of timm 1.0.31
    [("resnet18d", 11_708_744), ("resnet34d", 21_816_904), ("resnet50d", 25_576_264)],
)
def test_networks_have_the_layers_of_timm(name: str, num_parameters: int) -> None:
    network = build_network(name)
    assert sum(each.numel() for each in network.parameters()) == num_parameters
    names = set(network.state_dict())
    assert {"conv1.0.weight", "conv1.4.running_var", "conv1.6.weight", "bn1.weight"} <= names
    assert {"layer2.0.downsample.1.weight", "layer4.0.downsample.2.bias"} <= names
    assert {key for key in names if "downsample.0" in key} == set()


def test_shortcuts_average_where_others_skip_pixels() -> None:
    shortcut = build_network("resnet18d").get_submodule("layer2.0.downsample")
    assert isinstance(shortcut, nn.Sequential)
    images = torch.rand(1, 64, 4, 4)
    whole = shortcut[0](images)
    torch.testing.assert_close(whole[0, :, 0, 0], images[0, :, :2, :2].mean(dim=(1, 2)))
    assert shortcut.eval()(images).shape == (1, 128, 2, 2)


@pytest.mark.parametrize("name", RESNETS_D)
def test_an_encoder_goes_on_from_what_a_warm_up_has_learned(name: str) -> None:
    warm = build_feature_encoder(name, "random", seed=3, pixel_mean=0.2, pixel_std=0.3)
    state = {key.removeprefix("backbone."): value for key, value in warm.grey_state().items()}
    encoder = build_encoder(name, state, num_classes=3).eval()
    with torch.no_grad():
        found, expected = encoder.backbone((IMAGES - 0.2) / 0.3), warm(IMAGES)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert encoder(IMAGES).z.shape == (2, encoder.embedding_dim)


def test_weights_for_colours_are_summed_over_them() -> None:
    torch.manual_seed(0)
    network = build_network("resnet18d").eval()
    encoder = build_encoder("resnet18d", network.state_dict(), num_classes=3).eval()
    network.fc = nn.Identity()
    with torch.no_grad():
        expected = network(IMAGES.expand(-1, 3, -1, -1))
        torch.testing.assert_close(encoder.backbone(IMAGES), expected, atol=1e-4, rtol=1e-3)


def test_imagenet_weights_are_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"no weights of resnet18d: .* or choose resnet18$"):
        imagenet_state("resnet18d", "encoder.weights")
