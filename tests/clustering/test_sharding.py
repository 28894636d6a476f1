"""Whatever the number of ranks and the spread of rows over them, results are those of one rank."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from brainray import dist
from brainray.clustering.align import cluster_to_class, match_components
from brainray.clustering.collapse import effective_rank, measure_health
from brainray.clustering.gaussian import CovarianceType
from brainray.clustering.gmm import GaussianMixture
from brainray.clustering.kmeans import KMeans
from brainray.clustering.minibatch import MiniBatchKMeans
from brainray.clustering.pca import PCA
from brainray.errors import ClusteringError
from tests.ranks import OnRanks

NUM_ROWS, K, D, C = 301, 4, 6, 3
TYPES: list[CovarianceType] = ["spherical", "diag", "tied", "full"]
SHARDINGS = ["even", "uneven", "empty", "interleaved"]
Results = dict[str, Tensor]


def all_rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    blob = torch.arange(NUM_ROWS) % 5
    centers = 2 * torch.randn(5, D, generator=generator, dtype=torch.float64)
    return centers[blob] + torch.randn(NUM_ROWS, D, generator=generator, dtype=torch.float64) + 3


def rows_of_this_rank(sharding: str) -> Tensor:
    rows = torch.arange(NUM_ROWS)
    if dist.world_size() == 1:
        return rows
    if sharding == "interleaved":
        return rows[dist.rank() :: 2].flip(0)
    cut = {"even": NUM_ROWS // 2, "uneven": 37, "empty": 0}[sharding]
    return rows[:cut] if dist.rank() == 0 else rows[cut:]


def fit_everything(sharding: str) -> Results:
    """Everything that is fitted or measured across ranks, from this rank's rows."""
    mine = rows_of_this_rank(sharding)
    x = all_rows()[mine]
    # Contiguous shards have the default keys, so that these are tested too.
    keys = mine if sharding == "interleaved" else None
    results: Results = {}

    for dtype in (torch.float64, torch.float32):
        kmeans = KMeans(K, seed=5, num_init=2).fit(x.to(dtype), row_keys=keys)
        results[f"kmeans {dtype} centres"] = kmeans.cluster_centers_
        results[f"kmeans {dtype} numbers"] = torch.tensor([kmeans.inertia_ / 1e3, kmeans.n_iter_])
    batched = MiniBatchKMeans(K, seed=5).partial_fit(x, row_keys=keys).partial_fit(x + 0.1)
    results["mini-batch centres"] = batched.cluster_centers_
    # The last centre begins empty: the reseeded row must be the same one.
    start = torch.cat([all_rows()[: K - 1], torch.full((1, D), 1e3, dtype=torch.float64)])
    reseeded = KMeans(K).fit(x, row_keys=keys, init_centers=start)
    assert reseeded.num_reseeded_ >= 1
    results["kmeans reseeded"] = reseeded.cluster_centers_

    for covariance_type in TYPES:
        mixture = GaussianMixture(K, covariance_type, tol=1e-5, seed=2).fit(x, row_keys=keys)
        for name, value in mixture.named_buffers():
            results[f"gmm {covariance_type} {name}"] = value
        results[f"gmm {covariance_type} numbers"] = torch.tensor(
            [mixture.n_iter_, mixture.lower_bound_, mixture.score(x), mixture.bic(x) / 1e3]
        )
    gamma = mixture.predict_proba(x)
    vanished = gamma * torch.tensor([1.0, 1.0, 0.0, 1.0])
    vanished = vanished / vanished.sum(dim=1, keepdim=True).clamp(min=1e-12)
    again = GaussianMixture(K, "diag").fit(x, init_responsibilities=vanished, row_keys=keys)
    assert again.num_reseeded_ >= 1
    results["gmm reseeded"] = again.means_

    pca = PCA(3).fit(x)
    results |= {f"pca {name}": value for name, value in pca.named_buffers()}
    results["effective rank"] = torch.tensor(effective_rank(x))

    previous = torch.softmax(x[:, :K], dim=1)
    results["match"] = match_components(previous, gamma)
    labels = (mine * 7) % C
    means = torch.eye(C, D, dtype=torch.float64)
    for num_classes in (C, K):
        results[f"classes {num_classes}"] = cluster_to_class(
            gamma, labels, num_classes, mixture.means_, torch.cat([means, means])[:num_classes]
        )
    health = dataclasses.asdict(measure_health(x, gamma, previous))
    results |= {f"health {name}": torch.tensor(value) for name, value in health.items()}
    return results


def messages_of_errors() -> dict[str, str]:
    """What each rank says when the fault lies with the rows of one, or of all together."""
    x = all_rows()[rows_of_this_rank("uneven")]
    bad = x.clone()
    if dist.rank() == 1:
        bad[4, 2] = torch.nan
    same = torch.ones_like(x)
    faults: dict[str, Callable[[], object]] = {
        "nan kmeans": lambda: KMeans(K).fit(bad),
        "nan gmm": lambda: GaussianMixture(K).fit(bad),
        "nan pca": lambda: PCA(2).fit(bad),
        "nan health": lambda: measure_health(bad, torch.ones(len(bad), 2), torch.ones(len(bad), 2)),
        "identical": lambda: KMeans(K).fit(same),
        "too few": lambda: KMeans(NUM_ROWS + 1).fit(x),
        "repeated keys": lambda: KMeans(K).fit(x, row_keys=torch.arange(x.shape[0])),
    }
    messages = {}
    for name, fault in faults.items():
        with pytest.raises(ClusteringError) as caught:
            fault()
        messages[name] = str(caught.value)
    return messages


def everything() -> tuple[dict[str, Results], dict[str, str]]:
    return {sharding: fit_everything(sharding) for sharding in SHARDINGS}, messages_of_errors()


@pytest.fixture(scope="module")
def two_ranks(on_two_ranks: OnRanks) -> list[tuple[dict[str, Results], dict[str, str]]]:
    return on_two_ranks(everything)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_ranks_find_what_one_rank_finds(
    two_ranks: list[tuple[dict[str, Results], dict[str, str]]], sharding: str
) -> None:
    alone = fit_everything("even")
    for results, _ in two_ranks:
        assert results[sharding].keys() == alone.keys()
        for name, expected in alone.items():
            actual = results[sharding][name]
            assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_ranks_hold_the_same_bits(
    two_ranks: list[tuple[dict[str, Results], dict[str, str]]], sharding: str
) -> None:
    first, second = (results[sharding] for results, _ in two_ranks)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_every_rank_raises_the_same_error_when_one_has_bad_rows(
    two_ranks: list[tuple[dict[str, Results], dict[str, str]]],
) -> None:
    (_, first), (_, second) = two_ranks
    assert first == second
    for name in ("nan kmeans", "nan gmm", "nan pca", "nan health"):
        assert f"1 of {NUM_ROWS} rows contain NaN" in first[name]
    assert "only 1" in first["identical"]
    assert f"have {NUM_ROWS}" in first["too few"]
    assert f"37 of {NUM_ROWS} row_keys repeat" in first["repeated keys"]
