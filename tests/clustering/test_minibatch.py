"""Mini-batch K-means: running means, whatever the batches, and centres that nobody chose."""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs

from brainray.clustering.kmeans import KMeans
from brainray.clustering.minibatch import MiniBatchKMeans
from brainray.errors import ClusteringError


def blobs(num_rows: int = 600) -> torch.Tensor:
    rows, _ = make_blobs(num_rows, n_features=5, centers=4, cluster_std=0.5, random_state=1)
    return torch.from_numpy(rows + 100.0)


def test_centres_are_running_means_of_the_rows_that_chose_them() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [12.0]], dtype=torch.float64)
    kmeans = MiniBatchKMeans(2)
    kmeans.partial_fit(x[:3], init_centers=torch.tensor([[0.0], [10.0]]))
    torch.testing.assert_close(kmeans.cluster_centers_.flatten().tolist(), [0.5, 10.0])
    kmeans.partial_fit(x[3:])
    torch.testing.assert_close(kmeans.cluster_centers_.flatten().tolist(), [0.5, 11.0])
    assert kmeans.counts_.tolist() == [2.0, 2.0]
    assert kmeans.n_steps_ == 2


def test_batches_find_nearly_what_all_rows_at_once_find() -> None:
    x = blobs()
    whole = KMeans(4, num_init=5).fit(x)
    batched = MiniBatchKMeans(4)
    for batch in x.split(100):
        batched.partial_fit(batch)
    nearest = torch.cdist(batched.cluster_centers_, whole.cluster_centers_).min(dim=1)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
    assert nearest.values.max() < 0.2
    assert torch.equal(batched.predict(x), nearest.indices.argsort()[whole.predict(x)])


def test_a_centre_that_nobody_chose_goes_to_the_farthest_row() -> None:
    x = torch.tensor([[0.0], [1.0], [9.0]], dtype=torch.float64)
    kmeans = MiniBatchKMeans(2).partial_fit(x, init_centers=torch.tensor([[0.0], [1000.0]]))
    assert kmeans.num_reseeded_ == 1
    assert kmeans.cluster_centers_[1].tolist() == [9.0]


def test_the_state_travels() -> None:
    fitted = MiniBatchKMeans(4).partial_fit(blobs())
    loaded = MiniBatchKMeans(4)
    loaded.load_state_dict(fitted.state_dict())
    assert loaded.n_steps_ == 1
    one, two = fitted.partial_fit(blobs(50)), loaded.partial_fit(blobs(50))
    assert torch.equal(one.cluster_centers_, two.cluster_centers_)


def test_a_first_batch_must_hold_the_clusters() -> None:
    with pytest.raises(ClusteringError, match="first batch of at least as many rows"):
        MiniBatchKMeans(4).partial_fit(blobs()[:3])
    with pytest.raises(ClusteringError, match="NaN"):
        MiniBatchKMeans(2).partial_fit(torch.full((4, 2), np.nan))
