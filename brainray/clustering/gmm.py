"""Gaussian mixtures, fitted by expectation maximisation to rows distributed over ranks."""

import math
from collections.abc import Iterator
from typing import Any, Self, get_args

import torch
from torch import Tensor

from brainray import dist
from brainray.clustering import shards
from brainray.clustering.fitted import FittedModule
from brainray.clustering.gaussian import (
    CovarianceType,
    LogJoint,
    Scratch,
    SufficientStatistics,
    estimate_covariances,
    features_of,
    log_joint_of,
    normalise_,
    precisions_cholesky,
)
from brainray.clustering.kmeans import KMeans
from brainray.clustering.seeding import seed_of
from brainray.errors import ClusteringError

# A component with less responsibility than this, in rows, has vanished: its mean and covariance
# would be 0 / 0. The value is not tuned; any well-filled mixture is far above it.
_VANISHED_COUNT = 1e-3
_FEW_ROWS = 5  # per component and dimension


def has_few_rows(
    num_rows: int, num_components: int, num_dims: int, covariance_type: CovarianceType
) -> bool:
    """Whether full covariances have so few rows per component that other rows are outliers to them.

    With 3 rows per component and dimension, 15 to 46 % of the rows that four well-separated normal
    clusters had not been fitted to were beyond the 99th percentile of those that they had (by a
    script outside the project; three draws each of 400 rows x 32 and 800 rows x 64).
    """
    return covariance_type == "full" and num_rows < _FEW_ROWS * num_components * num_dims


class GaussianMixture(FittedModule):
    """Expectation maximisation (Bishop 2006, section 9.2) with scikit-learn's conventions.

    Rows are shifted by their mean and processed in blocks: products with rows are computed in
    their dtype, sums over blocks and parameters in float64. float32 rows are faster, but lose
    precision if components are much narrower than the distances between them. Each iteration has
    one collective, the sum of the sufficient statistics. A component that vanishes is moved to the
    row that the others explain worst, with their average covariance and weight 1 / K, and counted.

    Fitted attributes (tensors float64):
        weights_ (K,), means_ (K, D), covariances_, precisions_cholesky_: the mixture.
        converged_, n_iter_: whether and when the lower bound changed by less than `tol`.
        lower_bound_: mean log-likelihood of a row, before the last M-step.
        num_reseeded_: how often a vanished component was reseeded.
    """

    weights_: Tensor
    means_: Tensor
    covariances_: Tensor
    precisions_cholesky_: Tensor
    converged_: bool
    n_iter_: int
    lower_bound_: float
    num_reseeded_: int
    _fitted_numbers = ("converged_", "n_iter_", "lower_bound_", "num_reseeded_")

    def __init__(
        self,
        num_components: int,
        covariance_type: CovarianceType = "full",
        *,
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        seed: int = 0,
        num_init: int = 1,
    ) -> None:
        """
        Args:
            num_components: K.
            covariance_type: "spherical", "diag", "tied" or "full".
            tol: stop when the mean log-likelihood changes by less than this.
            reg_covar: added to every variance, in squared units of the rows.
            max_iter: limit of EM iterations.
            seed: of the K-means that gives the initial responsibilities.
            num_init: number of K-means starts; the mixture with the highest likelihood is kept.
        """
        super().__init__()
        if covariance_type not in get_args(CovarianceType):
            raise ClusteringError(
                f"covariance_type {covariance_type!r} is not one of {get_args(CovarianceType)}"
            )
        if min(num_components, max_iter, num_init) < 1 or reg_covar < 0:
            raise ClusteringError(
                f"num_components={num_components}, max_iter={max_iter} and num_init={num_init} "
                f"must be at least 1, and reg_covar={reg_covar} at least 0"
            )
        self.num_components = num_components
        self.covariance_type: CovarianceType = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.seed = seed
        self.num_init = num_init
        self._register_fitted("weights_", "means_", "covariances_", "precisions_cholesky_")
        self.converged_ = False
        self.n_iter_ = 0
        self.lower_bound_ = -math.inf
        self.num_reseeded_ = 0

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,  # (n_rank, D) float32 or float64
        *,
        init_responsibilities: Tensor | None = None,  # (n_rank, K)
        init_means: Tensor | None = None,  # (K, D)
        row_keys: Tensor | None = None,  # (n_rank,) int64
        allowed: Tensor | None = None,  # (n_rank, K) bool
    ) -> Self:
        """Fit the mixture to the rows of all ranks (collective).

        The initial parameters come from an M-step on `init_responsibilities`, by default K-means
        labels; given means replace its means (scikit-learn's means_init). Departure: K-means starts
        from `init_means` if given, so that its clusters are in the same order.

        Args:
            x: this rank's rows; may be empty.
            init_responsibilities: of this rank's rows; each row sums to 1.
            init_means: the same on every rank.
            row_keys: unique over all ranks; by default the global row index in rank order.
            allowed: components that may explain each row, at least one; by default all. This
                restricts rows of a known class to its components (Shental et al. 2003, "Computing
                Gaussian mixture models with EM using equivalence constraints").

        Raises:
            ClusteringError: on all ranks: rows with NaN or infinity, fewer rows (or, for K-means,
                distinct rows) than components, invalid initial responsibilities or means, a
                covariance that is not positive definite.
        """
        num_rows = shards.check_rows(x)
        if num_rows < self.num_components:
            raise ClusteringError(
                f"{self.num_components} components need at least as many rows, but all ranks "
                f"together have {num_rows}: lower clustering.num_clusters or add images"
            )
        row_keys = shards.resolve_row_keys(x, row_keys)
        origin = shards.mean_of_rows(x, num_rows).to(x.dtype)
        if init_means is not None:
            self._check_means(init_means, x)
        drawn = init_responsibilities is None and init_means is None
        best: dict[str, Any] = {}
        best_bound = -math.inf
        for number in range(self.num_init if drawn else 1):
            # Consecutive seeds must not share starts, or their results would be equal.
            seed = self.seed if number == 0 else seed_of(self.seed, number)
            self._begin(x, origin, row_keys, init_responsibilities, init_means, allowed, seed)
            self._iterate(x, origin, row_keys, allowed)
            # The margin prevents rounding from deciding between two starts with the same result.
            if not best or self.lower_bound_ > best_bound + 1e-9 * abs(best_bound):
                best, best_bound = self.state_dict(), self.lower_bound_
        if self.lower_bound_ != best_bound:
            self.load_state_dict(best)
        return self

    def _begin(
        self,
        x: Tensor,
        origin: Tensor,
        row_keys: Tensor,
        responsibilities: Tensor | None,
        means: Tensor | None,
        allowed: Tensor | None,
        seed: int,
    ) -> None:
        """Initialise from responsibilities (by default K-means labels) and given means."""
        self.num_reseeded_ = 0
        if responsibilities is None:
            responsibilities = self._kmeans_labels(x, row_keys, means, seed)
        statistics = self._statistics(x, origin, responsibilities)
        num_rows = dist.count_across_ranks(len(x), x.device)
        total = float(statistics.counts.sum())
        # Negated, so that NaN is rejected too.
        if not abs(total - num_rows) <= 1e-3 * num_rows:
            raise ClusteringError(
                f"init_responsibilities of {num_rows} rows sum to {total:g}: each row must sum to 1"
            )
        vanished = self._m_step(statistics, origin)
        self._reseed(vanished, x, row_keys, allowed)
        if means is not None:
            self.means_ = means.to(self.means_)

    def _iterate(self, x: Tensor, origin: Tensor, row_keys: Tensor, allowed: Tensor | None) -> None:
        """Iterate expectation and maximisation until the likelihood converges."""
        self.converged_ = False
        self.lower_bound_ = -math.inf
        self.n_iter_ = 0
        scratch = Scratch(x)
        while self.n_iter_ < self.max_iter and not self.converged_:
            self.n_iter_ += 1
            statistics = self._e_step(x, origin, allowed, scratch)
            vanished = self._m_step(statistics, origin)
            num_reseeded = self._reseed(vanished, x, row_keys, allowed)
            previous, self.lower_bound_ = self.lower_bound_, statistics.mean_log_likelihood()
            # A mixture with a newly reseeded component has not converged, whatever the likelihood.
            self.converged_ = not num_reseeded and abs(self.lower_bound_ - previous) < self.tol

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """Responsibilities gamma (n, K) of rows (n, D), in their dtype. Not collective."""
        gamma = x.new_empty(x.shape[0], self.num_components)
        for block, _, log_joint in self._log_joint_by_block(x, self._center(), Scratch(x)):
            gamma[block], _ = normalise_(log_joint)
        return gamma

    def predict(self, x: Tensor) -> Tensor:
        """Most responsible component of each row, (n,) int64. Not collective."""
        return self.predict_proba(x).argmax(dim=1)

    @torch.no_grad()
    def score_samples(self, x: Tensor) -> Tensor:
        """Log-likelihood of each row, (n,) float64. Not collective."""
        log_likelihood = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
        for block, _, log_joint in self._log_joint_by_block(x, self._center(), Scratch(x)):
            _, log_likelihood[block] = normalise_(log_joint)
        return log_likelihood

    def log_joint(self, x: Tensor) -> Tensor:
        """log(weight_k N(x_i | k)) (n, K) of rows (n, D), without blocks, for exported graphs.

        Its softmax is ``predict_proba``, its logsumexp ``score_samples``. Not collective.
        """
        origin = self._center().to(x.dtype)
        return self._log_joint_from(origin)(features_of(x, origin, self.covariance_type))

    def score(self, x: Tensor) -> float:
        """Mean log-likelihood over the rows of all ranks (collective)."""
        log_likelihood, num_rows = self._log_likelihood(x)
        return log_likelihood / num_rows

    def bic(self, x: Tensor) -> float:
        """Bayesian information criterion on the rows of all ranks, lower is better (collective)."""
        log_likelihood, num_rows = self._log_likelihood(x)
        return -2 * log_likelihood + self._num_parameters() * math.log(num_rows)

    def aic(self, x: Tensor) -> float:
        """Akaike information criterion on the rows of all ranks, lower is better (collective)."""
        log_likelihood, _ = self._log_likelihood(x)
        return -2 * log_likelihood + 2 * self._num_parameters()

    @torch.no_grad()
    def permute_(self, order: Tensor) -> Self:
        """Reorder components in place: the new component j is the old component order[j]."""
        self._check_is_fitted()
        order = order.to(self.weights_.device)
        if order.sort().values.tolist() != list(range(self.num_components)):
            raise ClusteringError(
                f"{order.tolist()} is not a permutation of {self.num_components} components"
            )
        self.weights_ = self.weights_[order]
        self.means_ = self.means_[order]
        if self.covariance_type != "tied":
            self.covariances_ = self.covariances_[order]
            self.precisions_cholesky_ = self.precisions_cholesky_[order]
        return self

    def _e_step(
        self, x: Tensor, origin: Tensor, allowed: Tensor | None, scratch: Scratch
    ) -> SufficientStatistics:
        """Sufficient statistics of all ranks' rows under the current mixture (collective)."""
        statistics = SufficientStatistics.zeros(
            self.num_components, x.shape[1], self.covariance_type, x.device
        )
        for block, features, log_joint in self._log_joint_by_block(x, origin, scratch):
            if allowed is not None:
                log_joint.masked_fill_(~allowed[block], -math.inf)
            gamma, log_likelihood = normalise_(log_joint)
            statistics.add(features, gamma, log_likelihood.sum(dtype=torch.float64), scratch)
        return statistics.sum_across_ranks()

    def _m_step(self, statistics: SufficientStatistics, origin: Tensor) -> Tensor:
        """Parameters from statistics; returns which components vanished, (K,) bool."""
        vanished = statistics.counts < _VANISHED_COUNT
        counts = torch.where(vanished, 0.0, statistics.counts)
        means = statistics.sums / torch.where(vanished, torch.inf, counts)[:, None]  # 0 if vanished
        self.weights_ = counts / counts.sum()
        self.means_ = means + origin
        self.covariances_ = estimate_covariances(statistics, means, vanished, self.reg_covar)
        self.precisions_cholesky_ = precisions_cholesky(self.covariances_, self.covariance_type)
        return vanished

    def _reseed(self, vanished: Tensor, x: Tensor, row_keys: Tensor, allowed: Tensor | None) -> int:
        """Move vanished components (weight 0) to the worst explained rows allowed for them.

        Returns the number of reseeded components.
        """
        if not vanished.any():
            return 0
        # In float32, likelihoods that differ only by rounding are ties, broken by the row keys.
        surprise = -self.score_samples(x).float()
        found = torch.zeros_like(vanished)
        for component in torch.nonzero(vanished).flatten().tolist():
            wanted = surprise
            if allowed is not None:
                wanted = surprise.masked_fill(~allowed[:, component], -math.inf)
            worst = shards.top_rows(x, wanted, row_keys, 1)
            if worst.scores[0] > -math.inf:  # else no row is allowed, and it stays vanished
                found[component] = True
                self.means_[component] = worst.rows[0].double()
                surprise = surprise.masked_fill((x == worst.rows).all(dim=1), -math.inf)
        num_found, share = int(found.sum()), 1 / self.num_components
        self.weights_ = torch.where(found, share, self.weights_ * (1 - num_found * share))
        self.num_reseeded_ += num_found
        return num_found

    def _kmeans_labels(
        self, x: Tensor, row_keys: Tensor, init_means: Tensor | None, seed: int
    ) -> Tensor:
        """K-means clusters as one-hot responsibilities (n_rank, K) float64 (collective)."""
        kmeans = KMeans(self.num_components, seed=seed)
        labels = kmeans.fit(x, row_keys=row_keys, init_centers=init_means).predict(x)
        return torch.nn.functional.one_hot(labels, self.num_components).double()

    def _statistics(
        self, x: Tensor, origin: Tensor, responsibilities: Tensor
    ) -> SufficientStatistics:
        """Sufficient statistics for given responsibilities of all ranks' rows (collective)."""
        expected = (x.shape[0], self.num_components)
        if tuple(responsibilities.shape) != expected:
            raise ClusteringError(
                f"init_responsibilities have shape {tuple(responsibilities.shape)}, expected "
                f"(rows, components) = {expected}"
            )
        statistics = SufficientStatistics.zeros(
            self.num_components, x.shape[1], self.covariance_type, x.device
        )
        unknown = torch.zeros((), dtype=torch.float64, device=x.device)
        origin, scratch = origin.to(x.dtype), Scratch(x)
        for block in self._blocks(x):
            gamma = responsibilities[block].to(device=x.device, dtype=x.dtype)
            features = features_of(x[block], origin, self.covariance_type, scratch)
            statistics.add(features, gamma, unknown, scratch)
        return statistics.sum_across_ranks()

    def _check_means(self, means: Tensor, x: Tensor) -> None:
        expected = (self.num_components, x.shape[1])
        if tuple(means.shape) != expected or not bool(torch.isfinite(means).all()):
            raise ClusteringError(
                f"init_means must be finite and of shape {expected}, but has shape "
                f"{tuple(means.shape)}: was it fitted with a different number of components or "
                "features?"
            )

    def _log_joint_by_block(
        self, x: Tensor, origin: Tensor, scratch: Scratch
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield blocks with their rows' features and log(weight_k N(x_i | k)) (B, K).

        Both are in scratch memory and are overwritten by the next block.
        """
        origin = origin.to(x.dtype)
        log_joint = self._log_joint_from(origin)
        for block in self._blocks(x):
            features = features_of(x[block], origin, self.covariance_type, scratch)
            yield block, features, log_joint(features, scratch)

    def _log_joint_from(self, origin: Tensor) -> LogJoint:
        """The log joint of rows relative to an origin (D,), in its dtype."""
        means, factors = self.means_ - origin, self.precisions_cholesky_
        return log_joint_of(self.weights_, means, factors, self.covariance_type, origin.dtype)

    def _blocks(self, x: Tensor) -> Iterator[slice]:
        width = 2 * x.shape[1] + self.num_components
        if self.covariance_type == "full":
            width = x.shape[1] * (self.num_components + 1)
        return shards.cached_blocks(x, 2 * width)

    def _center(self) -> Tensor:
        """The mean of the mixture; after an M-step, the mean of the fitted rows."""
        self._check_is_fitted()
        return self.weights_ @ self.means_

    def _log_likelihood(self, x: Tensor) -> tuple[float, int]:
        log_likelihood = self.score_samples(x)
        local = torch.stack([log_likelihood.sum(), log_likelihood.new_tensor(x.shape[0])])
        total, num_rows = dist.sum_across_ranks(local).tolist()
        if num_rows == 0:
            raise ClusteringError("no rows to score on any rank: pass at least one row")
        return total, int(num_rows)

    def _num_parameters(self) -> int:
        """Number of free parameters: covariances, means, and weights that sum to 1."""
        num_components, num_features = self.means_.shape
        triangle = num_features * (num_features + 1) // 2
        num_covariances = {
            "spherical": num_components,
            "diag": num_components * num_features,
            "tied": triangle,
            "full": num_components * triangle,
        }[self.covariance_type]
        return num_covariances + num_components * num_features + num_components - 1
