"""t-SNE maps of embeddings that can be compared between epochs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

MIN_SLICES = 5
"""Fewer slices have no neighbourhoods to show."""

_PERPLEXITY = 30.0
# Large initial distances impair t-SNE: Kobak & Berens, "The art of using t-SNE", 2019.
_START_STD = 1e-4


def tsne_sequence(
    embeddings: Sequence[NDArray[np.floating]], seed: int
) -> list[NDArray[np.float32]]:
    """t-SNE (van der Maaten & Hinton 2008) of the same N rows under successive encoders.

    The first map is initialised with the principal components of the embeddings, each later one
    with the previous map, to which it is then aligned by a rotation or reflection. t-SNE depends
    on distances only, so the alignment costs nothing and persistent groups stay near their place.

    Args:
        embeddings: (N, E) each, N at least MIN_SLICES, rows in the same order.
        seed: of the optimisation.

    Returns:
        (N, 2) each, with mean zero.
    """
    maps: list[NDArray[np.float32]] = []
    for z in embeddings:
        start = _start(z, maps[-1] if maps else None)
        perplexity = min(_PERPLEXITY, (len(z) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init=start, random_state=seed, learning_rate="auto")
        # With a few thousand rows, more threads cost more in synchronisation than they gain,
        # several times so on a busy machine.
        with threadpool_limits(1):
            points = tsne.fit_transform(z)
        points = points - points.mean(axis=0)
        if maps:
            points = points @ orthogonal_procrustes(points, maps[-1])[0]
        maps.append(np.asarray(points, dtype=np.float32))
    return maps


def _start(
    z: NDArray[np.floating], previous: NDArray[np.float32] | None
) -> NDArray[np.float32] | str:
    """Value of ``init`` for scikit-learn, which divides by the spread of the first component."""
    if previous is not None:
        return np.asarray(previous / previous[:, 0].std() * _START_STD, dtype=np.float32)
    return "random" if z.shape[1] < 2 or np.allclose(z, z[0]) else "pca"
