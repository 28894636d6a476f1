"""Slices of volumes whose brain is known: what skull strips are made of and measured on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from brainray.errors import DataError
from brainray.mri.nifti import decode_nifti
from brainray.mri.slices import DecodedSlice, DecodeOptions, RejectedImage

Plane = Literal["axial", "coronal", "sagittal"]
PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")

_VOLUME, _MASK = ".nii.gz", "_mask.nii.gz"


@dataclass(frozen=True)
class ReferenceSlice:
    """A slice as it is shown on screen, and where its brain is."""

    plane: Plane
    image: NDArray[np.uint8]  # (H, W)
    brain: NDArray[np.bool_]  # (H, W)


def find_heads(folder: Path) -> list[Path]:
    """The volumes, NAME.nii.gz, that a mask, NAME_mask.nii.gz, lies beside.

    Raises:
        DataError: there is none.
    """
    heads = [
        path
        for path in sorted(folder.glob(f"*{_VOLUME}"))
        if not path.name.endswith(_MASK) and _mask_of(path).exists()
    ]
    if not heads:
        raise DataError(f"no NAME{_VOLUME} with a NAME{_MASK} beside it in {folder}")
    return heads


def reference_slices(head: Path, plane: Plane) -> Iterator[ReferenceSlice]:
    """The slices of a volume that show some brain, in their order.

    Raises:
        DataError: the volume or its mask cannot be read, or they do not lie on the same voxels.
    """
    brains = {one.frame: one.image for one in _decoded(_mask_of(head), plane)}
    for one in _decoded(head, plane):
        brain = brains.get(one.frame)
        if brain is None or brain.shape != one.image.shape:
            raise DataError(f"{_mask_of(head)} has other voxels than {head}")
        if (brain > 127).any():
            yield ReferenceSlice(plane, one.image, brain > 127)


def _mask_of(head: Path) -> Path:
    return head.with_name(head.name.removesuffix(_VOLUME) + _MASK)


def _decoded(path: Path, plane: Plane) -> list[DecodedSlice]:
    options = DecodeOptions(
        min_side=1,
        max_pixels=2**24,
        max_voxels=2**28,
        axis=plane,
        window_percentiles=(0.5, 99.5),
        min_foreground=0.0,
        salt=b"none is named",
    )
    try:
        return decode_nifti(path.read_bytes(), options)
    except RejectedImage as rejection:
        raise DataError(f"{path}: {rejection}") from None
