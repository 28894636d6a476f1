"""One rank's slices: on the training device if they fit, else in a file that is read ahead."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from brainray import layout
from brainray.mri.row_file import RowFile
from brainray.storage import Folder

_READ_AHEAD = 3  # batches: one in training, one ready, one being read


@dataclass(frozen=True)
class PixelScale:
    """Mean and standard deviation of the training images' intensities, in units of [0, 1]."""

    mean: float
    std: float

    def to_unit(self, images: Tensor, side: int | None = None) -> Tensor:
        """(B, 1, H, W) uint8 to float32 in [0, 1]; (B, 1, side, side) if a side is given."""
        unit = images.float() / 255
        if side is None or side == images.shape[-1]:
            return unit
        if len(images) == 0:  # CUDA cannot launch a resize of no slices
            return unit.new_empty((0, 1, side, side))
        return F.interpolate(unit, size=(side, side), mode="bilinear", antialias=True)

    def standardise(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) float in [0, 1] to mean 0 and standard deviation 1, channels last."""
        scaled = (images - self.mean) / self.std
        return scaled.contiguous(memory_format=torch.channels_last)


class Images(Protocol):
    """n slices of side x side pixels, in any kind of storage."""

    device: torch.device

    def __len__(self) -> int: ...

    def put(self, row: int, image: NDArray[np.uint8]) -> None:
        """Store a slice (side, side); all must be stored before the first batch is read."""
        ...

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield (B, 1, side, side) uint8 for each index (B,) int64 on the CPU."""
        ...


class CachedImages:
    """Slices in the memory of the training device."""

    def __init__(self, images: Tensor) -> None:
        """``images``: (n, 1, side, side) uint8."""
        self.images = images
        self.device = images.device

    def __len__(self) -> int:
        return len(self.images)

    def put(self, row: int, image: NDArray[np.uint8]) -> None:
        self.images[row, 0] = torch.from_numpy(image)

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        indices = list(rows)
        if not indices:
            return
        # In one copy, because each copy to a GPU waits for its pending work.
        on_device = torch.cat(indices).to(self.device)
        for index in on_device.split([len(index) for index in indices]):
            yield self.images[index]


class StreamedImages:
    """Slices in an anonymous file on this node, which is removed when the process ends.

    A thread reads the next batches during training on the current one. Batches for a GPU are copied
    asynchronously from pinned memory.
    """

    def __init__(self, num_images: int, side: int, device: torch.device) -> None:
        """``device``: device of the batches."""
        self.device = device
        self.side = side
        self._num_images = num_images
        self._pins_memory = device.type == "cuda"
        self._rows = RowFile(side * side, np.uint8)

    def __len__(self) -> int:
        return self._num_images

    def put(self, row: int, image: NDArray[np.uint8]) -> None:
        self._rows[row] = image.reshape(-1)

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        waiting: deque[Future[Tensor]] = deque()
        # A new thread would pin memory by way of the node's first GPU, which is another rank's.
        on_gpu = partial(torch.cuda.set_device, self.device) if self._pins_memory else None
        with ThreadPoolExecutor(max_workers=1, initializer=on_gpu) as reader:
            for index in rows:
                waiting.append(reader.submit(self._read, index))
                if len(waiting) == _READ_AHEAD:
                    yield self._to_device(waiting.popleft())
            while waiting:
                yield self._to_device(waiting.popleft())

    def _read(self, index: Tensor) -> Tensor:
        shape = (len(index), 1, self.side, self.side)
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pins_memory)
        batch.numpy()[:] = self._rows[index.numpy()].reshape(shape)
        return batch

    def _to_device(self, batch: Future[Tensor]) -> Tensor:
        return batch.result().to(self.device, non_blocking=True)


@dataclass(frozen=True)
class SliceShard:
    """Slices of one role on one rank."""

    images: Images
    keys: Tensor  # (n,) int64, unique: from sample_id, or of test slices their rows in all ranks'
    labels: Tensor  # (n,) int64 class indices; UNLABELLED if the label may not be read

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class RankData:
    """All slices that one rank trains and evaluates on."""

    labelled: SliceShard  # without the validation part
    unlabelled: SliceShard
    validation: SliceShard
    test: SliceShard
    inherited: Tensor  # (n,) int64 for unlabelled: class of their subject's labelled slices

    @property
    def fitted_keys(self) -> Tensor:
        """Keys of the slices that the mixture is fitted on: labelled, then unlabelled."""
        return torch.cat([self.labelled.keys, self.unlabelled.keys])


def sample_keys(sample_ids: list[str]) -> NDArray[np.int64]:
    """(n,) int64 keys from the first 64 bits of each sample_id, for use in tensors."""
    values = np.array([int(identity[:16], 16) for identity in sample_ids], dtype=np.uint64)
    return values.view(np.int64)


def ids_of_keys(sample_ids: list[str], keys: Tensor) -> list[str]:
    """The sample_id of each key (n,), found among ``sample_ids``."""
    by_key = dict(zip(sample_keys(sample_ids).tolist(), sample_ids, strict=True))
    return [by_key[key] for key in keys.tolist()]


def seen_ids(folder: Folder) -> list[str]:
    """The sample_ids of all slices that a run or a warm-up learns from, given its folder."""
    seen = folder.read_table(layout.SEEN, columns=["sample_id"])
    return list(seen["sample_id"].to_pylist())
