import numpy as np
import pytest
import torch
from sklearn import decomposition
from torch import Tensor

from brainray.clustering.pca import PCA, _with_fixed_signs
from brainray.errors import ClusteringError


def stretched_rows(num_rows: int = 200, num_features: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    stretch = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, num_features, generator=generator, dtype=torch.float64)
    return noise @ stretch + 5


@pytest.mark.parametrize("num_rows", [200, 5])
def test_agrees_with_scikit_learn_up_to_sign(num_rows: int) -> None:
    x = stretched_rows(num_rows)
    ours, theirs = PCA(4).fit(x), decomposition.PCA(4, svd_solver="full").fit(x.numpy())
    signs = np.sign((ours.components_.numpy() * theirs.components_).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(ours.components_, signs * theirs.components_, atol=1e-9)
    np.testing.assert_allclose(ours.mean_, theirs.mean_, atol=1e-12)
    for name in ("explained_variance_", "explained_variance_ratio_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-9)
    np.testing.assert_allclose(
        ours.transform(x), signs.T * theirs.transform(x.numpy()), rtol=0, atol=1e-9
    )


def test_entry_of_largest_magnitude_is_positive_and_the_first_of_a_tie_decides() -> None:
    components = PCA(6).fit(stretched_rows()).components_
    assert bool((components.gather(1, components.abs().argmax(dim=1, keepdim=True)) > 0).all())
    # Equally large but for rounding, whichever way that goes.
    for rounding in (-1e-12, 1e-12):
        tie = torch.tensor([[-0.1, 1 + rounding, -1.0], [0.1, -1 - rounding, 1.0]]).double()
        assert _with_fixed_signs(tie).sign().tolist() == [[-1, 1, -1], [-1, 1, -1]]


def test_all_components_give_the_rows_back_in_their_dtype() -> None:
    x = stretched_rows().float()
    pca = PCA(6).fit(x)
    coordinates = pca.transform(x)
    assert coordinates.dtype == torch.float32
    back = (coordinates.double() @ pca.components_ + pca.mean_).float()
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    assert float(pca.explained_variance_ratio_.sum()) == pytest.approx(1)


def test_variances_survive_a_large_offset() -> None:
    x = stretched_rows()
    near, far = PCA(6).fit(x), PCA(6).fit(x + 1e6)
    torch.testing.assert_close(
        near.explained_variance_, far.explained_variance_, rtol=1e-7, atol=1e-9
    )


def test_identical_rows_explain_no_variance() -> None:
    pca = PCA(2).fit(torch.full((10, 3), 0.5))
    assert pca.explained_variance_.tolist() == [0, 0]
    assert pca.explained_variance_ratio_.tolist() == [0, 0]


def test_state_round_trips_into_a_module_that_was_not_fitted() -> None:
    x = stretched_rows()
    fitted, loaded = PCA(3).fit(x), PCA(3)
    with pytest.raises(ClusteringError, match="has not been fitted"):
        loaded.transform(x)
    loaded.load_state_dict(fitted.state_dict())
    assert torch.equal(loaded.transform(x), fitted.transform(x))


@pytest.mark.parametrize(("num_components", "shape"), [(7, (200, 6)), (6, (5, 6)), (1, (1, 6))])
def test_more_components_than_rows_or_features_are_refused(
    num_components: int, shape: tuple[int, int]
) -> None:
    message = f"cannot compute {num_components} principal components from {shape[0]} rows of 6"
    with pytest.raises(ClusteringError, match=message):
        PCA(num_components).fit(stretched_rows(*shape))
