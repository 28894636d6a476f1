"""Gaussian densities, and the statistics from which their parameters are estimated.

Parameters and sums over rows are float64; products with rows are taken in the rows' own dtype,
a block at a time. Shapes of covariances and of the Cholesky factors of precisions (upper triangular
U with U U^T = precision), as in scikit-learn:

    spherical (K,)   diag (K, D)   tied (D, D)   full (K, D, D)
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from brainray import dist
from brainray.errors import ClusteringError

CovarianceType = Literal["spherical", "diag", "tied", "full"]


def covariance_shape(
    num_components: int, num_features: int, covariance_type: CovarianceType
) -> tuple[int, ...]:
    return {
        "spherical": (num_components,),
        "diag": (num_components, num_features),
        "tied": (num_features, num_features),
        "full": (num_components, num_features, num_features),
    }[covariance_type]


@dataclass
class SufficientStatistics:
    """What the M-step needs to know of the rows, all relative to one origin; float64.

    `squares` holds sum_i gamma_ik x_i x_i^T, or what the covariance type needs of it:
    the diagonal (K, D) for "spherical" and "diag", the sum over k (D, D) for "tied".
    """

    counts: Tensor  # (K,) sum_i gamma_ik
    sums: Tensor  # (K, D) sum_i gamma_ik x_i
    squares: Tensor  # (K, D), (D, D) or (K, D, D)
    log_likelihood: Tensor  # () sum over rows
    covariance_type: CovarianceType

    @classmethod
    def zeros(
        cls,
        num_components: int,
        num_features: int,
        covariance_type: CovarianceType,
        device: torch.device,
    ) -> Self:
        squares: tuple[int, ...] = (num_components, num_features)
        if covariance_type in ("tied", "full"):
            squares = covariance_shape(num_components, num_features, covariance_type)
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        return cls(
            counts=nothing.new_zeros(num_components),
            sums=nothing.new_zeros(num_components, num_features),
            squares=nothing.new_zeros(squares),
            log_likelihood=nothing,
            covariance_type=covariance_type,
        )

    def add(self, rows: Tensor, gamma: Tensor, log_likelihood: Tensor) -> None:
        """Add rows (B, D) with responsibilities (B, K), and their summed log-likelihood."""
        self.counts += gamma.sum(dim=0, dtype=torch.float64)
        self.sums += gamma.T @ rows
        self.log_likelihood += log_likelihood
        if self.covariance_type == "full":
            # One product for all components: (K * D, B) @ (B, D).
            weighted = (gamma[:, :, None] * rows[:, None, :]).flatten(1)
            self.squares += (weighted.T @ rows).view_as(self.squares)
        elif self.covariance_type == "tied":
            self.squares += rows.T @ rows
        else:
            self.squares += gamma.T @ rows.square()

    def sum_across_ranks(self) -> "SufficientStatistics":
        """The same of all ranks' rows, in a single collective."""
        parts = (self.counts, self.sums, self.squares, self.log_likelihood)
        packed = dist.sum_across_ranks(torch.cat([part.flatten() for part in parts]))
        totals = torch.split(packed, [part.numel() for part in parts])
        counts, sums, squares, log_likelihood = (
            total.view_as(part) for total, part in zip(totals, parts, strict=True)
        )
        return SufficientStatistics(counts, sums, squares, log_likelihood, self.covariance_type)

    def mean_log_likelihood(self) -> float:
        return float(self.log_likelihood / self.counts.sum())


def estimate_covariances(
    statistics: SufficientStatistics,
    means: Tensor,  # (K, D), relative to the origin of the statistics
    vanished: Tensor,  # (K,) bool
    reg_covar: float,
) -> Tensor:
    """Maximum-likelihood covariances plus `reg_covar` on the diagonal.

    Vanished components get the average of the others, weighted by their responsibility.
    """
    counts = torch.where(vanished, 0.0, statistics.counts)
    if statistics.covariance_type == "tied":
        squares = statistics.squares - (counts[:, None] * means).T @ means
        return _symmetric(squares / statistics.counts.sum(), reg_covar)
    per_component = torch.where(vanished, 1.0, statistics.counts)
    if statistics.covariance_type == "full":
        outer = means[:, :, None] * means[:, None, :]
        covariances = statistics.squares / per_component[:, None, None] - outer
        covariances = _symmetric(covariances, reg_covar)
    else:
        # A variance of 0 may come out a rounding error below 0.
        variances = statistics.squares / per_component[:, None] - means.square()
        covariances = variances.clamp(min=0) + reg_covar
        if statistics.covariance_type == "spherical":
            covariances = covariances.mean(dim=1)
    average = torch.tensordot(counts / counts.sum(), covariances, dims=1)
    covariances[vanished] = average
    return covariances


def precisions_cholesky(covariances: Tensor, covariance_type: CovarianceType) -> Tensor:
    """Factors U with U U^T = covariance^-1.

    Raises:
        ClusteringError: if a covariance is not positive definite.
    """
    if covariance_type in ("spherical", "diag"):
        _require_positive_definite(bool((covariances > 0).all()), covariance_type)
        return covariances.rsqrt()
    lower, info = torch.linalg.cholesky_ex(covariances)  # covariance = L L^T
    _require_positive_definite(not bool(info.any()), covariance_type)
    identity = torch.eye(covariances.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False).mT


def cholesky_of_precisions(precisions: Tensor, covariance_type: CovarianceType) -> Tensor:
    """Factors U with U U^T = precision, U upper triangular.

    Raises:
        ClusteringError: if a precision is not positive definite.
    """
    if covariance_type in ("spherical", "diag"):
        _require_positive_definite(bool((precisions > 0).all()), covariance_type)
        return precisions.sqrt()
    # torch factors into lower L L^T; reversing both axes before and after turns L into U.
    lower, info = torch.linalg.cholesky_ex(precisions.flip(-1, -2))
    _require_positive_definite(not bool(info.any()), covariance_type)
    return lower.flip(-1, -2)


def log_gaussian(
    rows: Tensor,  # (B, D)
    means: Tensor,  # (K, D)
    factors: Tensor,  # precisions_cholesky
    covariance_type: CovarianceType,
) -> Tensor:  # (B, K)
    """Log densities log N(x_i | mu_k, Sigma_k), in the rows' dtype.

    Squared distances are expanded as x^2 - 2 x mu + mu^2 (but for "full", which forms a (B, K, D)
    tensor): shift rows and means to near 0 first.
    """
    num_features = rows.shape[1]
    if covariance_type == "full":
        # One product for all components: (B, D) @ (D, K * D).
        side_by_side = factors.transpose(0, 1).flatten(1)
        shifts = (means[:, None, :] @ factors).flatten()
        whitened = torch.addmm(-shifts.to(rows.dtype), rows, side_by_side.to(rows.dtype))
        distances = whitened.square_().view(rows.shape[0], len(means), num_features).sum(dim=2)
        log_det = factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    elif covariance_type == "tied":
        rows, means = rows @ factors.to(rows.dtype), means @ factors
        distances = _squared_distances(rows, means, torch.ones_like(means))
        log_det = factors.diagonal().log().sum()
    elif covariance_type == "diag":
        distances = _squared_distances(rows, means, factors.square())
        log_det = factors.log().sum(dim=1)
    else:
        precisions = factors.square()[:, None].expand_as(means)
        distances = _squared_distances(rows, means, precisions)
        log_det = num_features * factors.log()
    constant = log_det - 0.5 * num_features * math.log(2 * math.pi)
    return torch.add(constant.to(rows.dtype), distances, alpha=-0.5)


def _squared_distances(rows: Tensor, means: Tensor, precisions: Tensor) -> Tensor:
    """sum_d precision_kd (x_id - mu_kd)^2, (B, K)."""
    constant = (means.square() * precisions).sum(dim=1).to(rows.dtype)
    slopes, precisions = (means * precisions).to(rows.dtype), precisions.to(rows.dtype)
    cross = torch.addmm(constant, rows, slopes.T, alpha=-2)
    return cross.addmm_(rows.square(), precisions.T).clamp_(min=0)


def _symmetric(covariances: Tensor, reg_covar: float) -> Tensor:
    """Symmetric to the last bit, with `reg_covar` on the diagonal."""
    covariances = (covariances + covariances.mT) / 2
    covariances.diagonal(dim1=-2, dim2=-1).add_(reg_covar)
    return covariances


def _require_positive_definite(holds: bool, covariance_type: CovarianceType) -> None:
    if not holds:
        raise ClusteringError(
            f"a {covariance_type} covariance is not positive definite: raise reg_covar, reduce "
            "the embeddings with PCA, choose the diag or tied covariance, or use fewer components"
        )
