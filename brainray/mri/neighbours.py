"""Nearest neighbours among descriptors, exact for few and approximate for many."""

import faiss
import numpy as np
from numpy.typing import NDArray

_FLAT_ROWS = 8192  # up to so many every pair is compared
_PROBED_CELLS = 16


def neighbour_index(descriptors: NDArray[np.float32]) -> faiss.Index:
    """An index of inner products with descriptors (N, D), all of one length.

    Exhaustive for few; else cells around every n-th descriptor, of which some are searched.
    Descriptors come in an order that depends on their content alone, so that the centres do too.
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
