"""Maps of embeddings in the plane that can be compared from one epoch to the next."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

MIN_SLICES = 5
"""Fewer have no neighbourhoods to show."""

_PERPLEXITY = 30.0
# Large starting distances hamper t-SNE: Kobak & Berens, "The art of using t-SNE", 2019.
_START_STD = 1e-4


def tsne_sequence(
    embeddings: Sequence[NDArray[np.floating]], seed: int
) -> list[NDArray[np.float32]]:
    """t-SNE (van der Maaten & Hinton 2008) of the same N rows under one encoder after another.

    The first map starts from the embeddings' principal components, each later one from the map
    before it, to which it is then turned: t-SNE measures distances alone, so a rotation or a
    reflection leaves it as good, and groups that persist are found near their old place.

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
        tsne = TSNE(
            perplexity=perplexity, init=start, random_state=seed % 2**32, learning_rate="auto"
        )
        # A few thousand rows are too few to share: threads that wait for one another cost more
        # than they bring, several times so on a busy machine.
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
    """What scikit-learn takes as ``init``; it divides by the spread of the first component."""
    if previous is not None:
        return np.asarray(previous / previous[:, 0].std() * _START_STD, dtype=np.float32)
    return "random" if z.shape[1] < 2 or np.allclose(z, z[0]) else "pca"
