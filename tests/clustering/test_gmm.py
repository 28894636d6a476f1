import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as SklearnGaussianMixture
from torch import Tensor

from brainray.clustering import shards
from brainray.clustering.gaussian import (
    CovarianceType,
    SufficientStatistics,
    estimate_covariances,
    precisions_cholesky,
)
from brainray.clustering.gmm import GaussianMixture
from brainray.errors import ClusteringError

TYPES: list[CovarianceType] = ["spherical", "diag", "tied", "full"]
FITTED = ["weights_", "means_", "covariances_", "precisions_cholesky_"]
K, D = 4, 4  # equal on purpose: shapes alone do not tell diag from tied


def mixture_rows(num_rows: int = 500, num_features: int = D) -> Tensor:
    """Overlapping, stretched components, far enough from the origin to matter."""
    generator = torch.Generator().manual_seed(0)
    component = torch.arange(num_rows) % K
    stretch = torch.randn(K, num_features, num_features, generator=generator, dtype=torch.float64)
    means = 3 * torch.randn(K, num_features, generator=generator, dtype=torch.float64) + 20
    noise = torch.randn(num_rows, num_features, generator=generator, dtype=torch.float64)
    return means[component] + torch.einsum("ndj,nj->nd", stretch[component], noise)


def start(x: Tensor) -> Tensor:
    """Responsibilities (N, K) far from the end: of overlapping components of unequal weight."""
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    return torch.softmax(weights.log() - torch.cdist(x, x[:K]) / 8, dim=1)


def scikit_learn_mixture(
    x: Tensor, covariance_type: CovarianceType, responsibilities: Tensor, **options: float
) -> SklearnGaussianMixture:
    """scikit-learn's mixture from the M-step on these responsibilities, by its definition."""
    rows, gamma = x.numpy(), responsibilities.numpy()
    weights = gamma.mean(axis=0)
    covariances = np.stack(
        [np.cov(rows.T, aweights=each, bias=True) + 1e-6 * np.eye(D) for each in gamma.T]
    )
    variances = np.diagonal(covariances, axis1=1, axis2=2)
    precisions = {
        "spherical": 1 / variances.mean(axis=1),
        "diag": 1 / variances,
        "tied": np.linalg.inv(np.average(covariances, axis=0, weights=weights)),
        "full": np.linalg.inv(covariances),
    }[covariance_type]
    mixture = SklearnGaussianMixture(
        K,
        covariance_type=covariance_type,
        weights_init=weights,
        means_init=gamma.T @ rows / gamma.sum(axis=0)[:, None],
        precisions_init=precisions,
        **options,
    )
    return mixture.fit(rows)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_agrees_with_scikit_learn_from_the_same_start(covariance_type: CovarianceType) -> None:
    x = mixture_rows()
    gamma = start(x)
    ours = GaussianMixture(K, covariance_type, tol=1e-4, max_iter=300)
    ours.fit(x, init_responsibilities=gamma)
    theirs = scikit_learn_mixture(x, covariance_type, gamma, tol=1e-4, max_iter=300)
    for name in FITTED:
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-7, atol=1e-9)
    assert ours.converged_
    assert theirs.converged_
    assert ours.n_iter_ == theirs.n_iter_
    log_joint = ours.log_joint(x).numpy()
    np.testing.assert_allclose(np.exp(log_joint).sum(axis=1), np.exp(theirs.score_samples(x)))
    gamma = np.exp(log_joint - theirs.score_samples(x)[:, None])
    np.testing.assert_allclose(gamma, theirs.predict_proba(x), rtol=1e-6, atol=1e-9)
    assert ours.lower_bound_ == pytest.approx(theirs.lower_bound_, abs=1e-9)
    assert ours.score(x) == pytest.approx(theirs.score(x.numpy()), abs=1e-9)
    assert ours.bic(x) == pytest.approx(theirs.bic(x.numpy()), rel=1e-9)
    assert ours.aic(x) == pytest.approx(theirs.aic(x.numpy()), rel=1e-9)
    proba = theirs.predict_proba(x.numpy())
    np.testing.assert_allclose(ours.predict_proba(x), proba, rtol=0, atol=1e-7)
    assert ours.predict(x).tolist() == theirs.predict(x.numpy()).tolist()
    assert ours.num_reseeded_ == 0


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_start_from_responsibilities_is_their_m_step(covariance_type: CovarianceType) -> None:
    x = mixture_rows()
    generator = torch.Generator().manual_seed(1)
    gamma = torch.softmax(torch.randn(500, K, generator=generator, dtype=torch.float64), dim=1)
    ours = GaussianMixture(K, covariance_type, max_iter=3, tol=0)
    ours.fit(x, init_responsibilities=gamma)
    theirs = scikit_learn_mixture(x, covariance_type, gamma, max_iter=3, tol=0)
    for name in FITTED:
        np.testing.assert_allclose(
            getattr(ours, name), getattr(theirs, name), rtol=1e-8, atol=1e-10
        )


def test_default_start_is_kmeans_as_in_scikit_learn() -> None:
    blob = torch.arange(400) % K
    generator = torch.Generator().manual_seed(2)
    x = 8 * torch.eye(K, dtype=torch.float64)[blob] + torch.randn(
        400, K, generator=generator, dtype=torch.float64
    )
    ours = GaussianMixture(K, "full").fit(x)
    theirs = SklearnGaussianMixture(K, random_state=0).fit(x.numpy())
    order = torch.argsort(ours.means_.argmax(dim=1)), np.argsort(theirs.means_.argmax(axis=1))
    np.testing.assert_allclose(ours.means_[order[0]], theirs.means_[order[1]], atol=1e-8)
    np.testing.assert_allclose(
        ours.covariances_[order[0]], theirs.covariances_[order[1]], atol=1e-8
    )
    assert ours.n_iter_ == theirs.n_iter_


def test_components_keep_the_order_of_the_means_that_are_given() -> None:
    blob = torch.arange(200) % K
    x = 50 * torch.eye(K)[blob] + torch.randn(200, K, generator=torch.Generator().manual_seed(3))
    wanted = torch.tensor([2, 0, 3, 1])
    mixture = GaussianMixture(K, "diag").fit(x, init_means=50 * torch.eye(K)[wanted])
    assert mixture.means_.argmax(dim=1).tolist() == wanted.tolist()


@pytest.mark.parametrize("covariance_type", TYPES)
def test_likelihood_never_decreases(covariance_type: CovarianceType) -> None:
    x = mixture_rows()
    bounds = [
        GaussianMixture(K, covariance_type, tol=0, reg_covar=0, max_iter=n)
        .fit(x, init_responsibilities=start(x))
        .lower_bound_
        for n in range(1, 12)
    ]
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(bounds))
    assert bounds[-1] > bounds[0]


@pytest.mark.parametrize("covariance_type", TYPES)
def test_fit_does_not_lose_digits_far_from_the_origin(covariance_type: CovarianceType) -> None:
    x = mixture_rows()
    x = (x * 2**20).round() / 2**20  # so that the shift itself does not round
    near = GaussianMixture(K, covariance_type, tol=0, max_iter=10).fit(x)
    far = GaussianMixture(K, covariance_type, tol=0, max_iter=10).fit(x + 2.0**20)
    torch.testing.assert_close(near.covariances_, far.covariances_, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        near.predict_proba(x), far.predict_proba(x + 2.0**20), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("covariance_type", TYPES)
def test_blocks_change_nothing(
    covariance_type: CovarianceType, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = mixture_rows()
    whole = GaussianMixture(K, covariance_type, max_iter=5).fit(x)
    monkeypatch.setattr(shards, "rows_of_block", lambda *_: 33)
    blocks = GaussianMixture(K, covariance_type, max_iter=5).fit(x)
    torch.testing.assert_close(whole.means_, blocks.means_, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole.predict_proba(x), blocks.predict_proba(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_vanished_component_is_reseeded_on_the_row_explained_worst(
    covariance_type: CovarianceType,
) -> None:
    x = torch.cat([mixture_rows(), mixture_rows(6) + 300])
    gamma = torch.softmax(x[:, :K] / 10, dim=1)
    gamma[:, 2] = 0
    gamma /= gamma.sum(dim=1, keepdim=True)
    mixture = GaussianMixture(K, covariance_type, max_iter=50).fit(x, init_responsibilities=gamma)
    assert mixture.num_reseeded_ >= 1
    for name in FITTED:
        assert bool(torch.isfinite(getattr(mixture, name)).all())
    assert float(mixture.weights_.sum()) == pytest.approx(1)
    assert float(mixture.weights_.min()) > 1e-3
    # The far group of 6 rows was explained worst, and the component without rows took it.
    assert mixture.predict(x)[-6:].tolist() == [2] * 6


def test_vanished_components_take_different_rows() -> None:
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:2] = torch.tensor([[9.0, 0.0], [0.0, 9.0]])  # the rows explained worst
    all_in_one = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(60, 3)
    mixture = GaussianMixture(3, "diag", max_iter=1).fit(x, init_responsibilities=all_in_one)
    assert sorted(mixture.predict(x[:2]).tolist()) == [1, 2]


def test_a_reseeded_component_takes_its_share_of_the_others_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(GaussianMixture, "_iterate", lambda *_: None)  # the start alone
    gamma = torch.tensor([0.6, 0.4, 0.0, 0.0], dtype=torch.float64).expand(500, K)
    mixture = GaussianMixture(K, "diag").fit(mixture_rows(), init_responsibilities=gamma)
    assert mixture.num_reseeded_ == 2
    assert mixture.weights_.tolist() == pytest.approx([0.6 / 2, 0.4 / 2, 1 / 4, 1 / 4])


def test_a_mixture_with_a_component_just_reseeded_has_not_converged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_reseeded = iter([0, 1, 1, 1, 0])  # the first at the start
    monkeypatch.setattr(GaussianMixture, "_reseed", lambda *_: next(num_reseeded))
    mixture = GaussianMixture(2, "diag", tol=1e9).fit(mixture_rows())
    assert mixture.converged_
    assert mixture.n_iter_ == 4


def test_a_vanished_component_has_the_average_covariance_of_the_rows_of_the_others() -> None:
    counts = torch.tensor([30.0, 10.0, 0.0], dtype=torch.float64)
    variances = torch.tensor([[1.0], [5.0], [0.0]], dtype=torch.float64)
    means = torch.zeros(3, 1, dtype=torch.float64)
    statistics = SufficientStatistics(
        counts,
        sums=means,
        squares=counts[:, None] * variances,
        log_likelihood=torch.zeros(()),
        covariance_type="diag",
    )
    found = estimate_covariances(statistics, means, counts == 0, reg_covar=0.0)
    assert found.flatten().tolist() == pytest.approx([1, 5, (30 * 1 + 10 * 5) / 40])


@pytest.mark.parametrize("covariance_type", TYPES)
def test_a_vanished_component_takes_no_row_that_is_not_its(covariance_type: CovarianceType) -> None:
    x = torch.cat([mixture_rows(), mixture_rows(6) + 300])
    allowed = torch.ones(len(x), K, dtype=torch.bool)
    allowed[-6:, 2] = False  # the rows explained worst
    gamma = torch.softmax(x[:, :K] / 10, dim=1) * allowed
    gamma[:, 2] = 0
    gamma /= gamma.sum(dim=1, keepdim=True)
    mixture = GaussianMixture(K, covariance_type, max_iter=200)
    mixture.fit(x, init_responsibilities=gamma, allowed=allowed)
    assert mixture.converged_
    assert 1 <= mixture.num_reseeded_ < 10
    assert not (mixture.predict(x)[-6:] == 2).any()
    # A component that no row may be of stays away, and keeps no one from converging.
    allowed[:, 2] = False
    mixture.fit(x, init_responsibilities=gamma, allowed=allowed)
    assert mixture.converged_
    assert mixture.num_reseeded_ == 0
    assert float(mixture.weights_[2]) == 0
    assert bool(torch.isfinite(mixture.predict_proba(x)).all())


@pytest.mark.parametrize("covariance_type", TYPES)
def test_component_that_starts_where_no_row_is_comes_back(covariance_type: CovarianceType) -> None:
    x = mixture_rows()
    means = x[:K].clone()
    means[1] = 1e6
    mixture = GaussianMixture(K, covariance_type, max_iter=200)
    mixture.fit(x, init_responsibilities=start(x), init_means=means)
    assert mixture.num_reseeded_ == 1
    assert mixture.converged_
    assert bool(torch.isfinite(mixture.predict_proba(x)).all())
    assert torch.unique(mixture.predict(x)).numel() == K


@pytest.mark.parametrize("covariance_type", TYPES)
def test_more_features_than_rows_are_regularised(covariance_type: CovarianceType) -> None:
    x = torch.randn(12, 30, generator=torch.Generator().manual_seed(4))
    mixture = GaussianMixture(3, covariance_type, reg_covar=1e-3).fit(x)
    assert bool(torch.isfinite(mixture.precisions_cholesky_).all())
    proba = mixture.predict_proba(x)
    assert proba.dtype == torch.float32
    torch.testing.assert_close(proba.sum(dim=1), torch.ones(12))


def test_identical_rows_give_a_clear_error_or_with_responsibilities_a_point() -> None:
    x = torch.full((20, 3), 0.7)
    with pytest.raises(ClusteringError, match="only 1: lower"):
        GaussianMixture(2).fit(x)
    mixture = GaussianMixture(2).fit(x, init_responsibilities=torch.full((20, 2), 0.5))
    torch.testing.assert_close(mixture.means_, torch.full((2, 3), 0.7).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(mixture.covariances_, 1e-6 * torch.eye(3).double().expand(2, 3, 3))


def test_rows_far_from_every_component_still_have_probabilities() -> None:
    x = mixture_rows()
    mixture = GaussianMixture(K, "full").fit(x)
    far = torch.full((1, D), 1e5, dtype=torch.float64)
    assert float(mixture.predict_proba(far).sum()) == pytest.approx(1)
    assert float(mixture.score_samples(far)) < -1e6


@pytest.mark.parametrize("covariance_type", TYPES)
def test_permuted_components_permute_the_responsibilities(covariance_type: CovarianceType) -> None:
    x = mixture_rows()
    mixture = GaussianMixture(K, covariance_type).fit(x)
    order = torch.tensor([2, 0, 3, 1])
    before, score = mixture.predict_proba(x), mixture.score(x)
    after = mixture.permute_(order).predict_proba(x)
    torch.testing.assert_close(after, before[:, order], rtol=0, atol=1e-12)
    assert mixture.score(x) == pytest.approx(score)
    with pytest.raises(ClusteringError, match="not a permutation"):
        mixture.permute_(torch.tensor([0, 0, 1, 2]))


@pytest.mark.parametrize("covariance_type", TYPES)
def test_state_round_trips_into_a_module_that_was_not_fitted(
    covariance_type: CovarianceType,
) -> None:
    x = mixture_rows()
    fitted, file = GaussianMixture(K, covariance_type).fit(x), io.BytesIO()
    torch.save(fitted.state_dict(), file)
    file.seek(0)
    loaded = GaussianMixture(K, covariance_type)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.predict_proba(x), fitted.predict_proba(x))
    assert (loaded.converged_, loaded.n_iter_) == (fitted.converged_, fitted.n_iter_)
    assert loaded.lower_bound_ == fitted.lower_bound_


@pytest.mark.parametrize("covariance_type", ["tied", "full"])
def test_cholesky_factors_are_upper_triangular_roots_of_the_precision(
    covariance_type: CovarianceType,
) -> None:
    generator = torch.Generator().manual_seed(5)
    shape = (6, 6) if covariance_type == "tied" else (3, 6, 6)
    root = torch.randn(shape, generator=generator, dtype=torch.float64)
    covariances = root @ root.mT + 0.1 * torch.eye(6, dtype=torch.float64)
    precisions = torch.linalg.inv(covariances)
    factor = precisions_cholesky(covariances, covariance_type)
    torch.testing.assert_close(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.mT, precisions, rtol=1e-7, atol=1e-7)


def test_input_that_does_not_fit_is_refused_with_its_cause() -> None:
    x = mixture_rows()
    with pytest.raises(ClusteringError, match=r"501 components .* have 500"):
        GaussianMixture(501).fit(x)
    with pytest.raises(ClusteringError, match=r"init_means must be finite and of shape \(4, 4\)"):
        GaussianMixture(K).fit(x, init_means=x[:3])
    with pytest.raises(ClusteringError, match=r"expected \(rows, components\) = \(500, 4\)"):
        GaussianMixture(K).fit(x, init_responsibilities=torch.ones(500, 3))
    for wrong in (1.0, torch.nan):
        with pytest.raises(ClusteringError, match="each row must sum to 1"):
            GaussianMixture(K).fit(x, init_responsibilities=torch.full((500, K), wrong))
    with pytest.raises(ClusteringError, match="raise reg_covar"):
        GaussianMixture(K, "full", reg_covar=0).fit(x[:8])
    with pytest.raises(ClusteringError, match="is not one of"):
        GaussianMixture(K, "banded")  # type: ignore[arg-type]
    x[0, 0] = float("nan")
    with pytest.raises(ClusteringError, match="1 of 500 rows contain NaN"):
        GaussianMixture(K).fit(x)


def test_more_starts_never_explain_the_rows_worse() -> None:
    x = mixture_rows()
    bounds = [GaussianMixture(7, "diag", num_init=n).fit(x).lower_bound_ for n in (1, 2, 5)]
    assert bounds == sorted(bounds)
    assert bounds[-1] > bounds[0]
    kept = GaussianMixture(7, "diag", num_init=5).fit(x)
    assert kept.score(x) >= kept.lower_bound_ - 1e-9  # the parameters are those of the bound


def test_neighbouring_seeds_have_no_start_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []
    begin = GaussianMixture._begin

    def noted(self: GaussianMixture, *given: Any) -> None:
        starts.append(given[-1])
        begin(self, *given)

    monkeypatch.setattr(GaussianMixture, "_begin", noted)
    for seed in range(3):
        GaussianMixture(2, "diag", num_init=3, seed=seed).fit(mixture_rows())
    assert len(starts) == len(set(starts)) == 9
    assert starts[::3] == [0, 1, 2]  # the only start of a fit without others


@pytest.mark.parametrize("covariance_type", TYPES)
def test_float32_rows_lose_little(
    covariance_type: CovarianceType, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = mixture_rows()
    gamma = start(x)
    exact = GaussianMixture(K, covariance_type, tol=0.0, max_iter=20)
    exact.fit(x, init_responsibilities=gamma)
    monkeypatch.setattr(shards, "rows_of_block", lambda *_: 64)
    coarse = GaussianMixture(K, covariance_type, tol=0.0, max_iter=20)
    coarse.fit(x.float(), init_responsibilities=gamma)
    assert coarse.means_.dtype == torch.float64
    assert abs(coarse.score(x) / exact.score(x) - 1) < 1e-6
    torch.testing.assert_close(coarse.means_, exact.means_, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_rows_held_to_one_component_each_give_that_component_alone(
    covariance_type: CovarianceType,
) -> None:
    x = mixture_rows()
    component = torch.arange(len(x)) % K
    allowed = torch.nn.functional.one_hot(component, K).bool()
    mixture = GaussianMixture(K, covariance_type).fit(
        x, init_responsibilities=torch.full((len(x), K), 1 / K), allowed=allowed
    )
    means = torch.stack([x[component == k].mean(dim=0) for k in range(K)])
    torch.testing.assert_close(mixture.means_, means)
    torch.testing.assert_close(mixture.weights_, torch.full((K,), 1 / K, dtype=torch.float64))
    centered = x - means[component]
    by_component = torch.stack(
        [centered[component == k].T @ centered[component == k] / 125 for k in range(K)]
    )
    covariances = {
        "full": by_component,
        "tied": by_component.mean(dim=0),
        "diag": by_component.diagonal(dim1=1, dim2=2),
        "spherical": by_component.diagonal(dim1=1, dim2=2).mean(dim=1),
    }[covariance_type]
    noise = mixture.covariances_ - covariances
    torch.testing.assert_close(noise, torch.zeros_like(noise), atol=1e-5, rtol=0)


@pytest.mark.parametrize("covariance_type", ["spherical", "diag", "tied", "full"])
def test_exported_graphs_take_any_number_of_rows(covariance_type: CovarianceType) -> None:
    rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = GaussianMixture(2, covariance_type=covariance_type).fit(rows)

    class Graph(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return model.log_joint(x)

    sizes = {"x": {0: torch.export.Dim("rows")}}
    program = torch.export.export(Graph(), (rows[:2],), dynamic_shapes=sizes)
    torch.testing.assert_close(program.module()(rows), model.log_joint(rows))
