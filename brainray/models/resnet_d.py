"""ResNet-D: torchvision's ResNets with a deeper stem and shortcuts that average.

Source: He et al., "Bag of tricks for image classification with convolutional neural networks",
2019, figure 2 (c and d). Layers are named as in timm, whose files of weights fit.
"""

from typing import Any

import torchvision
from torch import nn

RESNETS_D = {"resnet18d": "resnet18", "resnet34d": "resnet34", "resnet50d": "resnet50"}
"""Names, and those of torchvision's networks of which they are made."""

_STEM_WIDTH = 32


def build_network(name: str, **options: Any) -> nn.Module:
    """Build a classifier of torchvision or of `RESNETS_D`, with random weights.

    Args:
        name: of the network, for colour images and ImageNet's classes.
        options: of torchvision's.
    """
    if name in RESNETS_D:
        return _as_resnet_d(torchvision.models.get_model(RESNETS_D[name], weights=None))
    return torchvision.models.get_model(name, weights=None, **options)


def _as_resnet_d(network: torchvision.models.ResNet) -> torchvision.models.ResNet:
    network.conv1 = nn.Sequential(
        *_convolution(3, _STEM_WIDTH, stride=2),
        *_convolution(_STEM_WIDTH, _STEM_WIDTH),
        _convolution(_STEM_WIDTH, network.bn1.num_features)[0],
    )
    for stage in (network.layer2, network.layer3, network.layer4):
        convolution, norm = stage[0].downsample
        convolution.stride = (1, 1)
        average = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        stage[0].downsample = nn.Sequential(average, convolution, norm)
    if network.layer1[0].downsample is not None:  # of bottlenecks, which is not strided
        network.layer1[0].downsample = nn.Sequential(nn.Identity(), *network.layer1[0].downsample)
    return network


def _convolution(num_in: int, num_out: int, stride: int = 1) -> list[nn.Module]:
    layer = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return [layer, nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)]
