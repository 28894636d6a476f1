"""Convolutions of small maps with many channels as matrix products, since oneDNN is slow on them.

ResNet's last stage has maps of 2 x 2 to 4 x 4 pixels for slices of 64 to 128 pixels, and took half
of the time of a step at 64 px. Measured with `jobs/benchmark.py training`.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MAX_PIXELS = 16  # of the output map
_MIN_CHANNELS = 512

Network = TypeVar("Network", bound=nn.Module)


class SmallMapConv2d(nn.Conv2d):
    """3 x 3 convolution with padding 1, using im2col (Chellapilla et al. 2006) for small maps on
    CPUs, and PyTorch's implementation otherwise and in exported and compiled models.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, O, ceil(H / stride), ceil(W / stride))."""
        stride = self.stride[0]
        height, width = input.shape[2:]
        if (
            torch.compiler.is_compiling()
            or not input.is_cpu
            or -(-height // stride) * -(-width // stride) > _MAX_PIXELS
        ):
            return super().forward(input)
        padded = F.pad(input, (1, 1, 1, 1)).permute(0, 2, 3, 1)
        patches = torch.cat(
            [
                padded[:, row : row + height : stride, column : column + width : stride]
                for row in range(3)
                for column in range(3)
            ],
            dim=3,
        )
        weight = self.weight.permute(0, 2, 3, 1).flatten(start_dim=1)
        return F.linear(patches, weight, self.bias).permute(0, 3, 1, 2)


def with_fast_small_maps(network: Network) -> Network:
    """Replace 3 x 3 convolutions with many channels by `SmallMapConv2d`, in place.

    Parameters stay the same objects with the same names.
    """
    for parent in list(network.modules()):
        for name, module in parent.named_children():
            if type(module) is nn.Conv2d and _is_fitting(module):
                fast = SmallMapConv2d(
                    module.in_channels,
                    module.out_channels,
                    kernel_size=3,
                    stride=module.stride[0],
                    padding=1,
                    bias=module.bias is not None,
                    device="meta",  # to draw no random weights
                )
                fast.weight, fast.bias = module.weight, module.bias
                setattr(parent, name, fast.train(module.training))
    return network


def _is_fitting(module: nn.Conv2d) -> bool:
    return (
        module.kernel_size == (3, 3)
        and module.padding == (1, 1)
        and module.dilation == (1, 1)
        and module.stride[0] == module.stride[1]
        and module.groups == 1
        and module.padding_mode == "zeros"
        and module.out_channels >= _MIN_CHANNELS
    )
