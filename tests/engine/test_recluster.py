"""Re-clustering: the mixture, its classes and its numbering."""

from dataclasses import replace
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from brainray import dist
from brainray.clustering.gmm import GaussianMixture
from brainray.clustering.kmeans import KMeans
from brainray.config import ClusteringConfig
from brainray.engine import recluster as recluster_module
from brainray.engine.recluster import (
    CheckedReclustering,
    Reclustering,
    _start_anchored,
    _with_a_cluster_of_each_class,
    build_mixture,
    check_num_clusters,
    recluster,
    recluster_with_check,
    weighted_means,
)
from brainray.errors import ClusteringError
from brainray.schema import UNLABELLED
from tests.ranks import OnRanks

OnCollapse = Literal["stop", "reseed", "warn"]
CONFIG = ClusteringConfig(num_clusters=3, pca_dim=4)


def blobs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three well-parted directions on the sphere, z (300, 16), and their number (300,)."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(300) % 3
    means = torch.eye(16)[:3] * 4
    z = means[truth] + 0.3 * torch.randn(300, 16, generator=generator)
    return torch.nn.functional.normalize(z), truth


def fit(
    z: Tensor, labels: Tensor, config: ClusteringConfig = CONFIG, **options: Any
) -> Reclustering:
    keys = torch.arange(len(z))
    return recluster(z, keys, labels, config=config, num_classes=3, seed=0, **options)


def anchored(num_clusters: int) -> ClusteringConfig:
    return ClusteringConfig(num_clusters=num_clusters, pca_dim=4, anchors="labelled")


def misleading_blobs() -> tuple[Tensor, Tensor]:
    """Two classes nearly on one spot, and a third that is two spots far apart; z (400, 16)."""
    generator = torch.Generator().manual_seed(0)
    spot = torch.arange(400) % 4
    means = 4 * torch.eye(16)[torch.tensor([0, 0, 1, 2])]
    means[1, 3] = 1.5
    z = means[spot] + 0.2 * torch.randn(400, 16, generator=generator)
    return torch.nn.functional.normalize(z), spot.clamp_max(2)


def test_clusters_take_the_classes_of_their_labelled_slices() -> None:
    z, truth = blobs()
    labels = torch.where(torch.arange(300) < 30, truth, UNLABELLED)
    result = fit(z, labels)
    predicted = result.model.class_of_cluster[result.responsibilities.argmax(dim=1)]
    assert torch.equal(predicted, truth)
    torch.testing.assert_close(result.responsibilities.sum(dim=1), torch.ones(300))
    torch.testing.assert_close(result.model.responsibilities(z), result.responsibilities)


def test_centres_are_responsibility_weighted_means_in_z_space() -> None:
    z, truth = blobs()
    result = fit(z, truth)
    gamma = result.responsibilities
    expected = (gamma.T @ z) / gamma.sum(dim=0)[:, None]
    torch.testing.assert_close(result.model.centers, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        weighted_means(z.double(), gamma.double()).float(), expected, rtol=1e-4, atol=1e-5
    )


def test_components_keep_their_numbers_from_epoch_to_epoch() -> None:
    z, truth = blobs()
    first = fit(z, truth)
    moved = torch.nn.functional.normalize(z + 0.02 * blobs(1)[0])
    second = fit(
        moved,
        truth,
        previous=first.model,
        previous_responsibilities=first.responsibilities,
    )
    assert torch.equal(first.responsibilities.argmax(dim=1), second.responsibilities.argmax(dim=1))
    shuffled = first.responsibilities[:, [2, 0, 1]]
    third = fit(moved, truth, previous=first.model, previous_responsibilities=shuffled)
    assert torch.equal(shuffled.argmax(dim=1), third.responsibilities.argmax(dim=1))
    torch.testing.assert_close(third.model.responsibilities(moved), third.responsibilities)


def test_a_model_has_the_settings_of_its_configuration() -> None:
    config = ClusteringConfig(
        num_clusters=3,
        pca_dim=4,
        covariance_type="tied",
        gmm_max_iter=7,
        gmm_tol=0.25,
        reg_covar=0.125,
        kmeans_max_iter=5,
    )
    mixture = build_mixture(config, 4, seed=8, num_init=9)
    found = [
        getattr(mixture, name)
        for name in ("num_components", "covariance_type", "max_iter", "tol", "reg_covar")
    ]
    assert found == [4, "tied", 7, 0.25, 0.125]
    z, truth = blobs()
    with patch.object(recluster_module, "KMeans", wraps=KMeans) as kmeans:
        recluster(z, torch.arange(300), truth, config=config, num_classes=3, seed=6)
    assert kmeans.call_args.kwargs["max_iter"] == 5
    assert kmeans.call_args.kwargs["seed"] == 6


def test_the_order_of_slices_changes_nothing() -> None:
    z, truth = blobs()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    config = CONFIG.model_copy(update={"num_clusters": 20})
    one, other = (
        recluster(z[rows], rows, truth[rows], config=config, num_classes=3, seed=0)
        for rows in (torch.arange(300), order)
    )
    torch.testing.assert_close(one.model.centers, other.model.centers)


def test_anchors_keep_clusters_to_classes_where_blobs_mislead() -> None:
    z, truth = misleading_blobs()
    labels = torch.where(torch.arange(400) < 80, truth, UNLABELLED)
    accuracy = {}
    for name, config in {"none": CONFIG, "labelled": anchored(3)}.items():
        result = fit(z, labels, config)
        again = fit(
            z,
            labels,
            config,
            previous=result.model,
            previous_responsibilities=result.responsibilities,
        )
        predicted = again.model.class_of_cluster[again.model.responsibilities(z).argmax(dim=1)]
        accuracy[name] = float((predicted == truth).double().mean())
    assert accuracy["none"] < 0.8
    assert accuracy["labelled"] > 0.98


def test_without_labels_there_are_no_anchors_and_clusters_stand_for_no_class() -> None:
    z, _ = blobs()
    keys, none = torch.arange(300), torch.full((300,), UNLABELLED)
    found, expected = (
        recluster(z, keys, none, config=config, num_classes=0, seed=0)
        for config in (anchored(3), CONFIG)
    )
    assert torch.equal(found.responsibilities, expected.responsibilities)
    assert found.model.class_of_cluster.tolist() == [0, 0, 0]


def test_a_labelled_slice_is_held_to_its_class_while_the_mixture_is_fitted() -> None:
    z, truth = blobs()
    labels = torch.where(torch.arange(300) < 30, truth, UNLABELLED)
    labels[0] = (truth[0] + 1) % 3  # in the midst of another class
    with patch.object(GaussianMixture, "fit", autospec=True, side_effect=GaussianMixture.fit) as em:
        fit(z, labels, anchored(3))
    allowed = em.call_args.kwargs["allowed"]
    assert allowed[30:].all()
    assert torch.equal(allowed[:30].sum(dim=1), torch.ones(30, dtype=torch.int64))
    of_class = allowed[1:30].int().argmax(dim=1)
    assert torch.equal(of_class, truth[1:30])
    assert allowed[0].int().argmax() == labels[0]


def test_k_means_starts_from_the_last_centres_or_from_ten_draws() -> None:
    z, truth = blobs()
    first = fit(z, truth)
    with patch.object(recluster_module, "KMeans", wraps=KMeans) as kmeans:
        fit(z, truth)
        fit(z, truth, previous=first.model, previous_responsibilities=first.responsibilities)
    anew, again = (call.kwargs["num_init"] for call in kmeans.call_args_list)
    assert (anew, again) == (10, 1)
    with patch.object(KMeans, "fit", autospec=True, side_effect=KMeans.fit) as warm:
        fit(z, truth, previous=first.model, previous_responsibilities=first.responsibilities)
    centers = warm.call_args.kwargs["init_centers"]
    torch.testing.assert_close(centers.float(), first.model.coordinates(first.model.centers))


def test_anchored_sub_types_stay_within_their_class() -> None:
    z, truth = misleading_blobs()
    labels = torch.where(torch.arange(400) < 80, truth, UNLABELLED)
    result = fit(z, labels, anchored(4))
    assert sorted(set(result.model.class_of_cluster.tolist())) == [0, 1, 2]
    predicted = result.model.class_of_cluster[result.responsibilities.argmax(dim=1)]
    assert float((predicted == truth).double().mean()) > 0.98


def test_a_class_that_has_lost_its_clusters_gets_one_back() -> None:
    z, truth = blobs()
    labels = torch.where(torch.arange(300) < 30, truth, UNLABELLED)
    before = fit(z, labels, anchored(5))
    centers, classes = before.model.centers, before.model.class_of_cluster
    # As if all of its clusters had gone to the middle of the first class's slices.
    lost = classes == 2
    centers[lost] = z[truth == 0].mean(dim=0)
    classes[lost] = 0
    after = fit(
        z,
        labels,
        anchored(5),
        previous=before.model,
        previous_responsibilities=before.responsibilities,
    )
    predicted = after.model.class_of_cluster[after.responsibilities.argmax(dim=1)]
    assert torch.equal(predicted, truth)


def test_with_more_clusters_than_classes_a_labelled_slice_starts_in_one_of_its_class() -> None:
    z, truth = (of_all[:90] for of_all in blobs())
    rows = torch.arange(90)
    labels = torch.where(rows < 30, truth, UNLABELLED)
    labels[3] = 1  # in the midst of class 0
    start = _start_anchored(z.double(), rows, labels, anchored(5), 3, 0, None)
    assert start.allowed is not None
    of_class = start.allowed[:3]  # as of the first slice of each
    assert of_class.sum(dim=0).tolist() == [1] * 5
    assert of_class.any(dim=1).all()
    of_slice = start.responsibilities.argmax(dim=1)
    assert of_class[torch.where(rows < 30, labels, truth), of_slice].all()
    assert torch.equal(start.allowed[:30], of_class[labels[:30]])
    assert start.allowed[30:].all()
    assert start.kmeans_iterations > 0


@pytest.mark.parametrize(("config", "num"), [(CONFIG, 7), (anchored(5), 7), (anchored(3), 5)])
def test_clusters_that_k_means_and_the_mixture_have_reseeded_are_counted(
    config: ClusteringConfig, num: int
) -> None:
    def reseeding(kind: type[KMeans] | type[GaussianMixture], num_reseeded: int) -> Any:
        as_ever = kind.fit

        def fit(self: Any, *rows: Tensor, **named: Any) -> Any:
            as_ever(self, *rows, **named)
            self.num_reseeded_ = num_reseeded
            return self

        return patch.object(kind, "fit", fit)

    z, truth = (of_all[:60] for of_all in blobs())
    with reseeding(KMeans, 2), reseeding(GaussianMixture, 5):
        assert fit(z, truth, config).num_reseeded == num  # K-means is not used with K = C anchors


def fit_this_ranks_rows(num_first: int) -> tuple[Tensor, Tensor]:
    """Of uneven shards, of which the first rank's has so many rows and the first labels."""
    z, truth = blobs()
    rows = torch.arange(300)
    if dist.world_size() > 1:
        rows = rows[:num_first] if dist.rank() == 0 else rows[num_first:]
    labels = torch.where(rows < 30, truth[rows], UNLABELLED)
    config = CONFIG.model_copy(update={"anchors": "labelled", "num_clusters": 5})
    found = recluster(z[rows], rows, labels, config=config, num_classes=3, seed=0)
    return found.model.centers, found.model.class_of_cluster


@pytest.mark.parametrize("num_first", [37, 3])  # more and fewer than clusters
def test_two_ranks_find_the_centres_and_classes_that_one_finds(
    num_first: int, on_two_ranks: OnRanks
) -> None:
    centers, classes = fit_this_ranks_rows(num_first)
    for centers_of_rank, classes_of_rank in on_two_ranks(fit_this_ranks_rows, num_first):
        torch.testing.assert_close(centers_of_rank, centers)
        assert torch.equal(classes_of_rank, classes)


def test_each_class_starts_with_a_cluster() -> None:
    centers = torch.tensor([[0.0, 0], [1, 0], [5, 0], [6, 0]])
    means = torch.tensor([[0.5, 0], [5.5, 0], [4, 1]])
    moved, classes = _with_a_cluster_of_each_class(centers, torch.tensor([0, 0, 1, 1]), means)
    assert classes.tolist() == [0, 0, 2, 1]
    assert moved.tolist() == [[0, 0], [1, 0], [4, 1], [6, 0]]
    # The nearest cluster stays, as it is the only one of its class.
    means = torch.tensor([[0.0, 0], [5.5, 0], [1, 1]])
    _, classes = _with_a_cluster_of_each_class(centers[1:], torch.tensor([0, 1, 1]), means)
    assert classes.tolist() == [0, 2, 1]
    # Also if the last clusters have all become of one class.
    _, classes = _with_a_cluster_of_each_class(centers, torch.tensor([1, 1, 1, 1]), means)
    assert sorted(set(classes.tolist())) == [0, 1, 2]


def test_k_must_fit_classes_and_slices() -> None:
    with pytest.raises(ClusteringError, match="num_clusters=3 is below the number of classes"):
        check_num_clusters(3, 4, 100)
    with pytest.raises(ClusteringError, match=r"num_clusters=9 exceeds .* \(8\)"):
        check_num_clusters(9, 4, 8)
    check_num_clusters(4, 4, 4)


@pytest.mark.parametrize(("on_collapse", "num_said"), [("stop", 0), ("reseed", 1), ("warn", 0)])
def test_embeddings_that_are_all_alike_stop_with_the_epoch(
    on_collapse: OnCollapse,
    num_said: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    z, labels = torch.ones(300, 16) / 4, torch.full((300,), UNLABELLED)
    config = CONFIG.model_copy(update={"on_collapse": on_collapse})
    uniform = torch.ones(300, 3) / 3

    def attempt(_: bool) -> Reclustering:
        return fit(z, labels, config)

    with pytest.raises(
        ClusteringError, match=r"^epoch 3(, also after reseeding)?: 3 clusters need"
    ):
        recluster_with_check(attempt, z, uniform, config, where="epoch 3", remedy="lower it")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == num_said


class Attempts:
    """Attempts to re-cluster, of which those without and with reseeding collapse or do not."""

    def __init__(self, collapses: dict[bool, bool]) -> None:
        self.z, truth = blobs()
        healthy = fit(self.z, truth)
        alike = torch.tensor([1.0, 0.0, 0.0]).expand(300, 3)
        self.result_of = {
            reseed: replace(healthy, responsibilities=alike) if is_collapsed else healthy
            for reseed, is_collapsed in collapses.items()
        }
        self.made: list[bool] = []

    def __call__(self, reseed: bool) -> Reclustering:
        self.made.append(reseed)
        return self.result_of[reseed]

    def checked(self, on_collapse: OnCollapse) -> CheckedReclustering:
        config = CONFIG.model_copy(update={"on_collapse": on_collapse})
        uniform = torch.ones(300, 3) / 3
        return recluster_with_check(
            self, self.z, uniform, config, where="epoch 3", remedy="lower it"
        )


@pytest.mark.parametrize("on_collapse", ["stop", "reseed", "warn"])
def test_healthy_clusters_are_taken_without_a_word(
    on_collapse: OnCollapse, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = Attempts({False: False})
    checked = attempts.checked(on_collapse)
    assert checked.reclustering is attempts.result_of[False]
    assert not checked.has_collapsed
    assert attempts.made == [False]
    assert capsys.readouterr().out == ""


def test_health_compares_with_the_last_epoch() -> None:
    attempts = Attempts({False: False})
    now = attempts.result_of[False].responsibilities
    changed = [
        recluster_with_check(attempts, attempts.z, last, CONFIG, where="", remedy="").health
        for last in (now, now[torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    ]
    assert changed[0].nmi_previous == pytest.approx(1.0)
    assert changed[1].nmi_previous < 0.1


def test_collapsed_clusters_stop_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    attempts = Attempts({False: True})
    with pytest.raises(ClusteringError, match=r"^epoch 3: the clustering has .*: lower it$"):
        attempts.checked("stop")
    assert attempts.made == [False]
    assert capsys.readouterr().out == ""


def test_collapsed_clusters_are_continued_with_after_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    attempts = Attempts({False: True})
    checked = attempts.checked("warn")
    assert checked.reclustering is attempts.result_of[False]
    assert checked.has_collapsed
    assert checked.health.largest_share == 1
    assert attempts.made == [False]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("warn: epoch 3: the clustering has collapsed")


def test_collapsed_clusters_are_replaced_by_reseeded_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    attempts = Attempts({False: True, True: False})
    checked = attempts.checked("reseed")
    assert checked.reclustering is attempts.result_of[True]
    assert not checked.has_collapsed
    assert checked.health.largest_share < 0.5
    assert attempts.made == [False, True]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("reseed: epoch 3: the clustering has collapsed")


def test_clusters_that_collapse_again_after_reseeding_stop_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    attempts = Attempts({False: True, True: True})
    with pytest.raises(ClusteringError, match=r"^epoch 3, also after reseeding: the clustering"):
        attempts.checked("reseed")
    assert attempts.made == [False, True]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("reseed: epoch 3: ")
