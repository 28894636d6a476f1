import dataclasses
import math
import re

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from brainray.clustering.collapse import (
    ClusteringHealth,
    describe_collapse,
    effective_rank,
    measure_health,
)
from brainray.errors import ClusteringError

HEALTHY = ClusteringHealth(
    smallest_share=0.1,
    largest_share=0.4,
    entropy=0.2,
    effective_rank=12.0,
    spread=0.5,
    nmi_previous=1.0,
)


def test_health_by_hand() -> None:
    z = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 0.5], [0.0, 9.0]])
    gamma = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    health = measure_health(z, gamma, gamma)
    assert health.smallest_share == pytest.approx(0.5 / 4)
    assert health.largest_share == pytest.approx(3.5 / 4)
    # One row of four does not know at all between two clusters.
    assert health.entropy == pytest.approx(1 / 4)
    # Two directions at right angles: each at distance 1 / sqrt(2) from their mean.
    assert health.spread == pytest.approx(0.5)
    assert health.effective_rank == effective_rank(z)
    assert health.nmi_previous == 1


def test_a_point_has_no_spread_and_one_cluster_no_entropy() -> None:
    health = measure_health(torch.full((30, 4), 3.0), torch.ones(30, 1), torch.ones(30, 1))
    assert health.spread == pytest.approx(0, abs=1e-12)
    assert health.effective_rank == 0
    assert (health.entropy, health.largest_share, health.nmi_previous) == (0, 1, 1)


@pytest.mark.parametrize("num_previous", [1, 3, 5])
def test_nmi_is_that_of_the_most_responsible_clusters(num_previous: int) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 4, generator=generator)
    current = torch.softmax(z, dim=1)
    previous = torch.softmax(torch.randn(200, num_previous, generator=generator), dim=1)
    previous[:, 0] += current[:, 0]
    expected = normalized_mutual_info_score(previous.argmax(dim=1), current.argmax(dim=1))
    nmi = measure_health(z, current, previous).nmi_previous
    assert nmi == pytest.approx(expected, abs=1e-12)
    assert measure_health(z, current, current.flip(1)).nmi_previous == pytest.approx(1)


def test_nmi_by_hand() -> None:
    before, now = torch.eye(2)[[0, 0, 1, 1]], torch.eye(3)[[0, 0, 1, 2]]
    assert measure_health(torch.eye(4), now, before).nmi_previous == pytest.approx(0.8)


def test_healthy_clustering_passes() -> None:
    assert describe_collapse(HEALTHY, max_share=0.4, min_spread=0.5) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"largest_share": 0.97}, r"97\.0% of all rows, more than the allowed 40\.0%"),
        ({"spread": 0.004}, r"0\.004, less than the allowed 0\.5"),
        ({"spread": math.nan}, "nan, less than"),
    ],
)
def test_collapse_is_reported_with_measurement_and_threshold(
    change: dict[str, float], message: str
) -> None:
    health = dataclasses.replace(HEALTHY, **change)
    found = describe_collapse(health, max_share=0.4, min_spread=0.5)
    assert found is not None
    assert re.search(message, found)


def test_no_rows_or_bad_rows_cannot_be_measured() -> None:
    with pytest.raises(ClusteringError, match="at least one row"):
        measure_health(torch.ones(0, 3), torch.ones(0, 2), torch.ones(0, 2))
    with pytest.raises(ClusteringError, match="1 of 1 rows contain NaN"):
        measure_health(torch.full((1, 3), torch.nan), torch.ones(1, 2), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("variances", "expected"),
    [((1, 1, 1, 1), 4), ((1, 0, 0, 0), 1), ((3, 3, 0, 0), 2), ((1, 3, 0, 0), 4 / 3**0.75)],
)
def test_effective_rank_by_hand(variances: tuple[float, ...], expected: float) -> None:
    # Rows +-sqrt(v_d) on each axis: a diagonal covariance in proportion to v. Shares 1/4 and 3/4
    # have the entropy ln 4 - 0.75 ln 3.
    axes = torch.tensor(variances).sqrt().diag()
    z = torch.cat([axes, -axes]) + 7
    assert effective_rank(z) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_of_a_point_is_zero() -> None:
    assert effective_rank(torch.full((50, 8), 0.1)) == 0
    assert effective_rank(torch.zeros(50, 8)) == 0


def test_fewer_rows_than_dimensions_have_an_effective_rank() -> None:
    z = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert 3 < effective_rank(z) <= 4  # five rows differ in four directions
