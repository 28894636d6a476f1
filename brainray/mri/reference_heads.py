"""Slices of volumes with known brain masks, for building and evaluating skull stripping."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from brainray.errors import DataError
from brainray.mri.nifti import decode_nifti
from brainray.mri.slices import DecodedSlice, DecodeOptions, Orientation

_VOLUME, _MASK = ".nii.gz", "_mask.nii.gz"


@dataclass(frozen=True)
class ReferenceSlice:
    """A slice as shown on screen, with its brain mask."""

    orientation: Orientation
    image: NDArray[np.uint8]  # (H, W)
    brain: NDArray[np.bool_]  # (H, W)


def find_heads(folder: Path) -> list[Path]:
    """The volumes NAME.nii.gz that have a mask NAME_mask.nii.gz in the same folder.

    Raises:
        DataError: there are none.
    """
    heads = [
        path
        for path in sorted(folder.glob(f"*{_VOLUME}"))
        if not path.name.endswith(_MASK) and _mask_of(path).exists()
    ]
    if not heads:
        raise DataError(f"{folder}: no NAME{_VOLUME} with a NAME{_MASK}")
    return heads


def reference_slices(head: Path, orientation: Orientation) -> Iterator[ReferenceSlice]:
    """The slices of a volume that show some brain, in order.

    Raises:
        DataError: the volume or its mask cannot be read, or they do not match.
    """
    mask = _mask_of(head)
    try:
        _check(nibabel.load(head), nibabel.load(mask), mask)
        brains = {one.frame: one.image > 127 for one in _decoded(mask, orientation)}
        for one in _decoded(head, orientation):
            brain = brains[one.frame]
            if brain.any():
                yield ReferenceSlice(orientation, one.image, brain)
    except DataError:
        raise
    except Exception as error:  # nibabel and zlib may raise anything
        raise DataError(f"{head.name} or {mask.name} cannot be read: {error}") from None


def dice(mask: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """Overlap of two masks (H, W), from 0 to 1 (Dice 1945)."""
    return float(2.0 * (mask & reference).sum() / (mask.sum() + reference.sum()))


def _check(head: Any, mask: Any, path: Path) -> None:
    if head.shape != mask.shape or not np.allclose(head.affine, mask.affine, atol=1e-3):
        raise DataError(f"{path} does not have the shape and affine of its volume")
    if min(head.shape) < 2 or head.ndim != 3:
        raise DataError(
            f"the volume of {path} has shape {head.shape}: 3 axes of 2 or more are needed"
        )
    values = np.unique(np.asarray(mask.dataobj))
    if len(values) != 2 or values[0] != 0:
        raise DataError(f"{path} must contain 0 and one value for brain, but contains {values[:5]}")


def _mask_of(head: Path) -> Path:
    return head.with_name(head.name.removesuffix(_VOLUME) + _MASK)


def _decoded(path: Path, orientation: Orientation) -> list[DecodedSlice]:
    options = DecodeOptions(
        min_side=1,
        max_pixels=2**24,
        max_voxels=2**28,
        axis=orientation,
        window_percentiles=(0.5, 99.5),
        min_foreground=0.0,
        salt=b"none is named",
    )
    return decode_nifti(path.read_bytes(), options, maps=True)
