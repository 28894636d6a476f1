"""The moving average of a network's weights, and the batch statistics that go with them."""

from copy import deepcopy
from typing import Generic, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import update_bn

from brainray import dist
from brainray.config import AugmentConfig
from brainray.engine.forward import autocast
from brainray.engine.shard import Images, PixelScale
from brainray.models.augment import augment

_SLICES_FOR_STATISTICS = 2048

Network = TypeVar("Network", bound=nn.Module)


class MovingAverage(Generic[Network]):
    """Exponential moving average of a network's weights.

    Polyak & Juditsky 1992; as a teacher, Tarvainen & Valpola 2017. Its batch statistics are those
    of the network until they are measured (`measure_batch_statistics`).

    Attributes:
        network: a copy of the network, with the averaged weights.
        has_begun: whether it has weights to average with; if not, the first update copies them.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.network = deepcopy(network)
        self.has_begun = False
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, num_batches: int = 1) -> None:
        """Move towards the network's weights, as PyTorch's `AveragedModel` does.

        Unlike there, nothing waits for a GPU. After an update with several batches, of all workers
        together, the average decays as after as many updates with one (Busbridge et al. 2023), so
        that it spans as many epochs.
        """
        mine, theirs = tuple(self.network.parameters()), tuple(network.parameters())
        if self.has_begun:
            torch._foreach_lerp_(mine, theirs, 1 - self._decay**num_batches)
        else:
            torch._foreach_copy_(mine, theirs)
            self.has_begun = True
        if buffers := tuple(self.network.buffers()):
            torch._foreach_copy_(buffers, tuple(network.buffers()))


@torch.no_grad()
def measure_batch_statistics(
    model: nn.Module,
    images: Images,
    *,
    augmentation: AugmentConfig,
    scale: PixelScale,
    batch_size: int,
    precision: str,
    side: int | None = None,
) -> None:
    """Recompute the means and variances of batch normalisation from plain and augmented slices
    of all ranks (collective).

    Averaged weights have no statistics (Izmailov et al. 2018, section 3.2), and running ones are
    those of augmented slices only. As in Wu & Johnson 2021 ("Rethinking 'Batch' in BatchNorm",
    section 3), they are measured again, on a fixed sample of at most 2,048 slices. Half of each
    batch is as in inference and half has the ``augmentation``, which keeps the encoder robust to
    slices that differ from these. The ranks' statistics are averaged. A single slice, which may
    have no variance, changes nothing.
    """
    order = torch.randperm(len(images), generator=Generator().manual_seed(0))
    chosen = order[: max(_SLICES_FOR_STATISTICS // dist.world_size(), 2)]
    if len(chosen) < 2:
        dist.average_buffers(model, 0)
        return
    # All batches count the same in the mean, so their sizes differ by at most one slice; none has
    # a single slice.
    num_batches = min(-(-len(chosen) // batch_size), len(chosen) // 2)
    batches = images.batches(chosen.tensor_split(num_batches))
    generator = Generator(images.device).manual_seed(0)

    def seen(batch: Tensor) -> Tensor:
        with autocast(images.device, "fp32"):  # as in training, views are computed in fp32
            unit = scale.to_unit(batch, side)
            as_they_are, augmented = unit.tensor_split(2)
            views = augment(augmented, augmentation, generator)
            return scale.standardise(torch.cat([as_they_are, views]))

    with autocast(images.device, precision):
        update_bn(map(seen, batches), model)
    dist.average_buffers(model, len(chosen))
