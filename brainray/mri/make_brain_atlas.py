"""Make a brain atlas from heads with known brain masks.

    python -m brainray.mri.make_brain_atlas --out FILE.npz DIR

DIR contains volumes, NAME.nii.gz, and their brain masks, NAME_mask.nii.gz.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.errors import BrainrayError, DataError
from brainray.mri.brain_atlas import GRID, on_square, smooth
from brainray.mri.head import Plane, find_head
from brainray.mri.reference_heads import ReferenceSlice, find_heads, reference_slices
from brainray.mri.slices import ORIENTATIONS

_OUTSIDE_QUANTILES = (1 / 3, 2 / 3)  # of grey values, between labels 1, 2 and 3
_INSIDE_QUANTILES = (0.35,)  # between labels 4 and 5

_NUM_SLICES = 200
_SPACING = 6  # slices
_CUT = 0.3  # of coronal and sagittal slices, as clinical scans often omit the neck and more
_MIN_BRAIN = 0.02  # of the largest brain in the plane
_MIN_WITHIN_HEAD = 0.95  # of the brain
_LABEL_WEIGHT = 0.7


def write_atlas(path: Path, slices: Iterable[ReferenceSlice], num_slices: int) -> int:
    """Write the most representative slices for `BrainAtlas.read`, and return their number.

    Slices are selected greedily, each minimising the mean distance of all slices to the nearest
    selected one: the BUILD step of partitioning around medoids (Kaufman and Rousseeuw 1990).

    Raises:
        DataError: no slice shows a head with a brain.
    """
    described, is_sagittal = [], []
    for one in slices:
        found = describe(one.image, one.brain)
        if found is not None:
            described.append(found)
            is_sagittal.append(one.orientation == "sagittal")
    if not described:
        raise DataError("no slice of these volumes shows a head with a brain")
    labels, brains = (np.stack(part) for part in zip(*described, strict=True))
    taken = _medoids(_distances(labels, brains), num_slices)
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            labels=labels[taken],
            brains=np.round(brains[taken] * 255.0).astype(np.uint8),
            is_sagittal=np.array(is_sagittal)[taken],
        )
    return len(taken)


def describe(
    image: NDArray[np.uint8], brain: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], Plane] | None:
    """Labels and brain fraction (GRID, GRID) of a slice (H, W) with its brain mask.

    None if the head or brain is too small, or something else was detected as the head.
    """
    head = find_head(image)
    if head is None:
        return None
    height, width = head.mask.shape
    shrunk = cv2.resize(brain.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    if shrunk[head.mask > 0].sum() < _MIN_WITHIN_HEAD * shrunk.sum():
        return None
    share, grey = (on_square(smooth(plane, head), head) for plane in (shrunk, head.signal))
    inside = share > 0.5
    outside = (on_square(head.mask.astype(np.float32), head) > 0.5) & ~inside
    if np.count_nonzero(inside) < 3 or np.count_nonzero(outside) < 6:
        return None
    labels = np.zeros((GRID, GRID), np.uint8)
    first = 1
    for cells, quantiles in ((outside, _OUTSIDE_QUANTILES), (inside, _INSIDE_QUANTILES)):
        labels[cells] = first + np.searchsorted(np.quantile(grey[cells], quantiles), grey[cells])
        first += len(quantiles) + 1
    return labels, share


def _distances(labels: NDArray[np.uint8], brains: Plane) -> NDArray[np.float32]:
    """Distances (N, N) from the overlap of brains and the agreement of labels (N, GRID, GRID)."""
    labels, brains = labels.reshape(len(labels), -1), brains.reshape(len(brains), -1)
    size = brains.sum(axis=1)
    distances = np.empty((len(brains),) * 2, np.float32)
    for row in range(len(brains)):
        overlap = 2.0 * np.minimum(brains[row], brains).sum(axis=1) / (size[row] + size)
        agreement = (labels[row] == labels).mean(axis=1)
        distances[row] = 1.0 - overlap + _LABEL_WEIGHT * (1.0 - agreement)
    return distances


def _medoids(distances: NDArray[np.float32], number: int) -> list[int]:
    nearest = np.full(len(distances), np.inf, np.float32)
    taken: list[int] = []
    while len(taken) < number and nearest.max() > 1e-6:
        taken.append(int(np.minimum(nearest, distances).mean(axis=1).argmin()))
        nearest = np.minimum(nearest, distances[taken[-1]])
    return taken


def _slices_of(folder: Path) -> Iterator[ReferenceSlice]:
    """Every sixth slice with enough brain; coronal and sagittal ones also without the neck."""
    for head in find_heads(folder):
        for orientation in ORIENTATIONS:
            found = list(reference_slices(head, orientation))
            largest = max(np.count_nonzero(one.brain) for one in found)
            enough = [one for one in found if np.count_nonzero(one.brain) > _MIN_BRAIN * largest]
            for one in enough[::_SPACING]:
                yield one
                if orientation != "axial":
                    kept = round((1.0 - _CUT) * len(one.image))
                    yield ReferenceSlice(orientation, one.image[:kept], one.brain[:kept])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m brainray.mri.make_brain_atlas",
        description="Make a brain atlas from NAME.nii.gz and NAME_mask.nii.gz files in a folder.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--out", metavar="FILE.npz", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        if not given.out.parent.is_dir():
            raise DataError(f"folder {given.out.parent} does not exist")
        number = write_atlas(given.out, _slices_of(given.folder), _NUM_SLICES)
    except BrainrayError as error:
        print(f"make_brain_atlas: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: {number} slices")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
