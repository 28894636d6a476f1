import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from brainray.clustering import metrics
from brainray.clustering.metrics import clustering_metrics, silhouette


def test_agreement_does_not_depend_on_numbering() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    agreement = clustering_metrics(labels, np.array([2, 2, 0, 0, 1, 1]))
    assert agreement == pytest.approx({"nmi": 1, "ari": 1, "fmi": 1})


def test_agreement_by_hand() -> None:
    # Pairs together in both: 1; in the first only: 1 (of 2); in the second only: 1 (of 2).
    agreement = clustering_metrics(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]))
    assert agreement["fmi"] == pytest.approx(1 / 2**0.5)
    # I = ln 2; entropies ln 2 and 1.5 ln 2.
    assert agreement["nmi"] == pytest.approx(0.8)
    # Rand: (1 - 2*1/6) / ((2 + 1)/2 - 2*1/6) = (2/3) / (7/6)
    assert agreement["ari"] == pytest.approx(4 / 7)


def test_silhouette_is_none_where_it_is_not_defined() -> None:
    z = np.eye(4)
    assert silhouette(z, np.zeros(4, dtype=int)) is None
    assert silhouette(z, np.arange(4)) is None
    assert silhouette(z[:0], np.arange(0)) is None


def test_above_the_limit_a_drawn_sample_has_the_silhouette(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_SILHOUETTE_ROWS", 30)
    generator = np.random.default_rng(7)
    z, clusters = generator.normal(size=(200, 3)), np.arange(200) % 3
    drawn = {seed: np.random.default_rng(seed).choice(200, 30, replace=False) for seed in (0, 5)}
    sample_scores = {
        seed: silhouette_score(z[rows], clusters[rows]) for seed, rows in drawn.items()
    }
    assert sample_scores[0] != pytest.approx(sample_scores[5])
    for seed, expected in sample_scores.items():
        assert silhouette(z, clusters, seed) == pytest.approx(expected)
