"""Re-clustering between epochs: PCA, K-means, Gaussian mixture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from brainray import dist
from brainray.clustering.align import cluster_to_class, match_components
from brainray.clustering.collapse import ClusteringHealth, describe_collapse, measure_health
from brainray.clustering.gmm import GaussianMixture
from brainray.clustering.kmeans import KMeans
from brainray.clustering.pca import PCA
from brainray.config import ClusteringConfig
from brainray.errors import ClusteringError

_INITIAL_RESTARTS = 10


def build_mixture(
    config: ClusteringConfig, num_components: int, *, seed: int = 0, num_init: int = 1
) -> GaussianMixture:
    """A mixture with the settings of the configuration, not yet fitted."""
    return GaussianMixture(
        num_components,
        covariance_type=config.covariance_type,
        max_iter=config.gmm_max_iter,
        tol=config.gmm_tol,
        reg_covar=config.reg_covar,
        seed=seed,
        num_init=num_init,
    )


class ClusterModel(nn.Module):
    """A fitted mixture with the PCA before it and the mapping of clusters to classes.

    It is only valid with the encoder whose embeddings it was fitted on. Its state_dict restores it.
    """

    centers: Tensor  # (K, E) float32, mu in the space of z
    class_of_cluster: Tensor  # (K,) int64

    def __init__(self, config: ClusteringConfig, embedding_dim: int) -> None:
        super().__init__()
        num_components = min(config.pca_dim, embedding_dim)
        self.pca = PCA(num_components)
        self.gmm = build_mixture(config, config.num_clusters)
        self.register_buffer("centers", torch.zeros(config.num_clusters, embedding_dim))
        self.register_buffer(
            "class_of_cluster", torch.zeros(config.num_clusters, dtype=torch.int64)
        )

    def coordinates(self, z: Tensor) -> Tensor:
        """(N, P) float32 coordinates of embeddings (N, E) in the space of the mixture."""
        return self.pca.transform(z)

    def responsibilities(self, z: Tensor) -> Tensor:
        """Responsibilities gamma (N, K) float32 of embeddings (N, E)."""
        return self.gmm.predict_proba(self.pca.transform(z.double())).float()

    def log_likelihood(self, z: Tensor) -> Tensor:
        """(N,) float32 log density of embeddings (N, E) under the mixture; low for outliers."""
        return self.gmm.score_samples(self.pca.transform(z.double())).float()


@dataclass(frozen=True)
class Reclustering:
    """A new mixture and this rank's responsibilities under it."""

    model: ClusterModel
    responsibilities: Tensor  # (n, K) float32, rows as in the embeddings
    kmeans_iterations: int
    gmm_iterations: int
    num_reseeded: int


class CheckedReclustering(NamedTuple):
    """A re-clustering with which the run continues."""

    reclustering: Reclustering
    health: ClusteringHealth
    has_collapsed: bool  # although `clustering.on_collapse` lets the run continue


@torch.no_grad()
def recluster(
    z: Tensor,
    keys: Tensor,
    labels: Tensor,
    *,
    config: ClusteringConfig,
    num_classes: int,
    seed: int,
    previous: ClusterModel | None = None,
    previous_responsibilities: Tensor | None = None,
) -> Reclustering:
    """Fit PCA, K-means and the mixture on the embeddings of all ranks (collective).

    The result is the same on every rank. PCA is only used to compute gamma. The centres mu_k =
    sum_i gamma_ik z_i / sum_i gamma_ik are kept in the space of z, since the PCA basis changes
    between epochs. Components are numbered as in the previous epoch (Hungarian matching on the
    overlap of responsibilities).

    Args:
        z: this rank's embeddings, (n, E) float32, of all training slices except validation.
        keys: (n,) int64, globally unique; they make the result independent of the sharding.
        labels: (n,) int64, UNLABELLED if the label may not be read; the others decide which class a
            cluster is mapped to, and as anchors, which clusters they may belong to.
        config: K, covariance type, PCA dimensions and limits.
        num_classes: C; 0 if there are no labels: no anchors, and clusters stand for no class.
        seed: of the initial seeding.
        previous: mixture of the last epoch, from whose centres the fit starts.
        previous_responsibilities: (n, K), of the last epoch, rows as in z.

    Raises:
        ClusteringError: K is below C or above the number of slices, or the embeddings cannot be
            clustered.
    """
    check_num_clusters(config.num_clusters, num_classes, dist.count_across_ranks(len(z), z.device))
    model = ClusterModel(config, z.shape[1]).to(z.device)
    wide = z.double()
    reduced = model.pca.fit(wide).transform(wide)
    last = None
    if previous is not None:
        last = model.pca.transform(previous.centers.double()), previous.class_of_cluster
    if config.anchors == "labelled" and num_classes:
        start = _start_anchored(reduced, keys, labels, config, num_classes, seed, last)
    else:
        start = _start_by_kmeans(reduced, keys, config, seed, None if last is None else last[0])
    model.gmm.fit(
        reduced,
        init_responsibilities=start.responsibilities,
        row_keys=keys,
        allowed=start.allowed,
    )
    gamma = model.gmm.predict_proba(reduced)
    if previous_responsibilities is not None:
        order = match_components(previous_responsibilities.double(), gamma)
        model.gmm.permute_(order)
        gamma = gamma[:, order]
    centers = weighted_means(wide, gamma)
    model.centers.copy_(centers)
    readable = labels >= 0
    if num_classes:
        model.class_of_cluster.copy_(
            _classes_of(gamma[readable], wide[readable], labels[readable], num_classes, centers)
        )
    return Reclustering(
        model=model,
        responsibilities=gamma.float(),
        kmeans_iterations=start.kmeans_iterations,
        gmm_iterations=model.gmm.n_iter_,
        num_reseeded=start.num_reseeded + model.gmm.num_reseeded_,
    )


def recluster_with_check(
    attempt: Callable[[bool], Reclustering],
    z: Tensor,
    previous_responsibilities: Tensor,
    config: ClusteringConfig,
    *,
    where: str,
    remedy: str,
) -> CheckedReclustering:
    """Re-cluster, and handle a collapse according to ``clustering.on_collapse`` (collective).

    Args:
        attempt: re-clusters, starting from the last centres, or from scratch if called with True.
        z: (n, E), this rank's embeddings.
        previous_responsibilities: (n, K).
        config: limits and ``on_collapse``.
        where: epoch or round, for messages.
        remedy: what to do about a collapse, for the error message.

    Raises:
        ClusteringError: on every rank, if the clusters have collapsed and reseeding, if configured,
            did not help.
    """

    def checked(reseed: bool) -> CheckedReclustering:
        prefix = f"{where}, also after reseeding" if reseed else where
        try:
            found = attempt(reseed)
            health = measure_health(z, found.responsibilities, previous_responsibilities)
        except ClusteringError as problem:
            raise ClusteringError(f"{prefix}: {problem}") from problem
        collapse = describe_collapse(health, config.max_cluster_share, config.min_spread)
        if collapse is None:
            return CheckedReclustering(found, health, has_collapsed=False)
        message = f"{prefix}: {collapse}: {remedy}"
        if config.on_collapse != "warn":
            raise ClusteringError(message)
        dist.log_once(f"warn: {message}")
        return CheckedReclustering(found, health, has_collapsed=True)

    try:
        return checked(reseed=False)
    except ClusteringError as problem:
        if config.on_collapse != "reseed":
            raise
        dist.log_once(f"reseed: {problem}")
    return checked(reseed=True)


class _Start(NamedTuple):
    """Initial state of the mixture."""

    responsibilities: Tensor  # (n, K) float64, one-hot
    allowed: Tensor | None  # (n, K) bool
    kmeans_iterations: int = 0
    num_reseeded: int = 0


def _start_by_kmeans(
    reduced: Tensor, keys: Tensor, config: ClusteringConfig, seed: int, centers: Tensor | None
) -> _Start:
    """Start of METHOD A: K-means from the last epoch's centres (K, P), if any."""
    kmeans = KMeans(
        config.num_clusters,
        max_iter=config.kmeans_max_iter,
        seed=seed,
        num_init=1 if centers is not None else _INITIAL_RESTARTS,
    )
    kmeans.fit(reduced, row_keys=keys, init_centers=centers)
    hard = nn.functional.one_hot(kmeans.predict(reduced), config.num_clusters).double()
    return _Start(hard, None, kmeans.n_iter_, kmeans.num_reseeded_)


def _start_anchored(
    reduced: Tensor,
    keys: Tensor,
    labels: Tensor,
    config: ClusteringConfig,
    num_classes: int,
    seed: int,
    last: tuple[Tensor, Tensor] | None,
) -> _Start:
    """Assign each slice to the nearest centre, and labelled slices to one of their class.

    The centres (K, P) and their classes (K,) are the ``last`` ones, or in the first epoch the class
    means or, with more clusters than classes, those of K-means. K-means does not iterate
    afterwards, as it knows nothing of the classes. A class without a cluster is given one.
    """
    readable = labels >= 0
    known = reduced[readable], labels[readable]
    kmeans = None
    means = _class_means(*known, num_classes)
    if last is not None:
        centers, class_of_cluster = last
    elif config.num_clusters == num_classes:
        centers, class_of_cluster = means, torch.arange(num_classes, device=labels.device)
    else:
        kmeans = _start_by_kmeans(reduced, keys, config, seed, None)
        centers = weighted_means(reduced, kmeans.responsibilities)
        votes = kmeans.responsibilities[readable]
        class_of_cluster = _classes_of(votes, *known, num_classes, centers)
    centers, class_of_cluster = _with_a_cluster_of_each_class(centers, class_of_cluster, means)
    allowed = (labels[:, None] == class_of_cluster) | ~readable[:, None]
    distances = torch.cdist(reduced, centers).masked_fill(~allowed, torch.inf)
    hard = nn.functional.one_hot(distances.argmin(dim=1), config.num_clusters).double()
    if kmeans is None:
        return _Start(hard, allowed)
    return kmeans._replace(responsibilities=hard, allowed=allowed)


def _with_a_cluster_of_each_class(
    centers: Tensor, class_of_cluster: Tensor, means: Tensor
) -> tuple[Tensor, Tensor]:
    """Centres (K, P) and classes (K,) of the clusters, in which each of C classes has a cluster.

    A class without one is given the nearest cluster of a class with several, moved to the class
    mean (C, P): otherwise its labelled slices would have no cluster to be held to.
    """
    centers, classes = centers.clone(), class_of_cluster.clone()
    counts = torch.bincount(classes, minlength=len(means))
    for missing in torch.nonzero(counts == 0).flatten().tolist():
        spare = torch.nonzero(counts[classes] > 1).flatten()
        taken = spare[(centers[spare] - means[missing]).square().sum(dim=1).argmin()]
        counts[classes[taken]] -= 1
        centers[taken], classes[taken] = means[missing], missing
    return centers, classes


def _classes_of(
    gamma: Tensor, z: Tensor, labels: Tensor, num_classes: int, centers: Tensor
) -> Tensor:
    """(K,) int64 class of each cluster, from labelled rows only: gamma (m, K), z (m, E), labels
    (m,).
    """
    means = _class_means(z, labels, num_classes)
    return cluster_to_class(gamma, labels, num_classes, centers=centers, class_means=means)


def _class_means(z: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C, E) float64 class means over all ranks, of rows z (m, E) with labels (m,)."""
    return weighted_means(z, nn.functional.one_hot(labels, num_classes).double())


def check_num_clusters(num_clusters: int, num_classes: int, num_slices: int) -> None:
    """Reject a K below the number of classes or above the number of slices."""
    if num_clusters < num_classes:
        raise ClusteringError(
            f"clustering.num_clusters={num_clusters} is below the number of classes "
            f"({num_classes}): every class needs a cluster; raise it, or give a labels table if "
            "some class folders, such as those of patients, are no classes"
        )
    if num_clusters > num_slices:
        raise ClusteringError(
            f"clustering.num_clusters={num_clusters} exceeds the number of training slices "
            f"({num_slices}): lower it or add slices"
        )


def weighted_means(z: Tensor, weights: Tensor) -> Tensor:
    """(K, E) float64: sum_i w_ik z_i / sum_i w_ik over all ranks, with z (n, E) and w (n, K)."""
    totals = dist.sum_across_ranks(weights.T @ z)
    mass = dist.sum_across_ranks(weights.sum(dim=0))
    return totals / mass.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
