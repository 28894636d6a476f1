"""Nearest neighbours among descriptors: exact for few rows, approximate for many."""

import faiss
import numpy as np
from numpy.typing import NDArray

_FLAT_ROWS = 8192  # up to this many rows every pair is compared
_PROBED_CELLS = 16


def neighbour_index(descriptors: NDArray[np.float32]) -> faiss.Index:
    """An inner-product index of descriptors (N, D), all of the same length.

    Exhaustive for few descriptors; otherwise cells around every n-th descriptor, some of which are
    searched. The order of the descriptors depends only on their content, and so do the centres.
    """
    dimension = descriptors.shape[1]
    flat = faiss.IndexFlatIP(dimension)
    if len(descriptors) <= _FLAT_ROWS:
        flat.add(descriptors)
        return flat
    num_cells = int(4 * np.sqrt(len(descriptors)))
    flat.add(descriptors[:: len(descriptors) // num_cells])
    index = faiss.IndexIVFFlat(flat, dimension, flat.ntotal, faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True
    index.add(descriptors)
    index.nprobe = _PROBED_CELLS
    return index
